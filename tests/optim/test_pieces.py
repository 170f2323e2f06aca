"""The pieces of a slice are the rectangles of the whole weight that the slice covers."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_step.optim.pieces import owned_pieces


@pytest.mark.parametrize(("start", "stop"), [(0, 600), (0, 1), (7, 590), (100, 200), (130, 160)])
def test_pieces_cover_a_slice_of_a_rank_of_two(start: int, stop: int) -> None:
    """A weight [5, 240] whose columns two tensor-parallel ranks split: this one has columns 120 to 239."""
    whole = torch.arange(5 * 240).view(5, 240)
    own = whole[:, 120:].contiguous()
    shard = ShardedTensor.from_rank_offsets("w", own, (1, 1, 2), replica_id=(0, 0, 0))
    flat = own.flatten()[start:stop]
    found, scales = [], 0
    for piece in owned_pieces(shard, slice(start, stop)):
        place = piece.place
        assert (piece.key, place.whole_columns) == ("w", 240)
        expected = whole[place.first_row :, place.first_column :][: piece.rows, : piece.columns]
        assert torch.equal(piece.of(flat), expected)
        blocks = {int(column) // 64 for column in range(place.first_column, place.first_column + piece.columns)}
        assert piece.blocks == len(blocks)
        assert piece.first_scale == scales
        scales += piece.rows * piece.blocks
        cut = {block for block in blocks if not _is_within(block, place.first_column, piece.columns)}
        assert {min(blocks) + block for block in piece.shared_blocks()} == cut
        found.append(piece.of(flat).flatten())
    assert torch.equal(torch.cat(found), flat)


def _is_within(block: int, first_column: int, columns: int) -> bool:
    """Whether all columns of a block of the whole weight are among a piece's."""
    return first_column <= 64 * block and min(64 * block + 64, 240) <= first_column + columns


def test_a_vector_is_one_row() -> None:
    shard = ShardedTensor.from_rank_offsets("v", torch.arange(100.0), (0, 1, 2), replica_id=(0, 0, 0))
    (piece,) = owned_pieces(shard, slice(20, 70))
    assert (piece.rows, piece.columns, piece.place.first_row, piece.place.first_column) == (1, 50, 0, 120)

"""Ranks that hold parts of one block learn the largest magnitude over all parts; other blocks are not exchanged."""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from worlds import Worlds

from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.ops.moment_codes import block_peaks
from megatron_step.optim.pieces import owned_pieces
from megatron_step.optim.shared_blocks import SharedBlocks


def test_the_largest_of_a_block_is_that_of_the_whole_weight(worlds: Worlds) -> None:
    """Four ranks: columns split by two, and the flattened halves again by two data-parallel ranks."""
    whole = torch.randn(6, 240, generator=torch.Generator().manual_seed(1))
    expected = block_peaks(whole, 0)
    for found in worlds(4).run(largest_of_each_piece, whole=whole):
        assert found, "every rank holds a part of some shared block"
        for (row, block), value in found.items():
            assert value == [float(expected[row, block])] * 2


def test_blocks_that_lie_within_ranks_are_not_shared(worlds: Worlds) -> None:
    assert worlds(4).run(number_of_shared_blocks, columns=256, rows=4) == [0] * 4
    assert worlds(4).run(number_of_shared_blocks, columns=192, rows=4) == [4] * 4


# What the ranks run.


def largest_of_each_piece(whole: torch.Tensor) -> dict[tuple[int, int], list[float]]:
    with parallel_layout(ParallelConfig(tensor_parallel_size=2), 1) as parallel:
        own = whole.chunk(2, 1)[parallel.tp_rank].contiguous()
        shard = ShardedTensor.from_rank_offsets("w", own, (1, parallel.tp_rank, 2), replica_id=(0, 0, 0))
        middle = 3 * 120 + 50
        elements = slice(0, middle) if parallel.dp_rank == 0 else slice(middle, own.numel())
        flat = own.flatten()[elements]
        pieces = list(owned_pieces(shard, elements))
        shared = SharedBlocks(pieces, parallel)
        peaks = {
            piece: block_peaks(piece.of(flat), piece.place.first_column).expand(2, -1, -1)
            for piece in pieces
            if piece.shared_blocks()
        }
        largest = shared.largest(peaks)
        return {
            (piece.place.first_row + row, piece.place.first_column // 64 + block): of_piece[:, row, block].tolist()
            for piece, of_piece in largest.items()
            for row in range(piece.rows)
            for block in piece.shared_blocks()
        }


def number_of_shared_blocks(rows: int, columns: int) -> int:
    with parallel_layout(ParallelConfig(tensor_parallel_size=2), 1) as parallel:
        own = torch.zeros(rows, columns // 2)
        shard = ShardedTensor.from_rank_offsets("w", own, (1, parallel.tp_rank, 2), replica_id=(0, 0, 0))
        return len(SharedBlocks(list(owned_pieces(shard, slice(0, own.numel()))), parallel))

"""The rectangles of a slice cover it once, and share its memory."""

from itertools import pairwise

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_step.optim.slices import pieces, rectangles


def _cuts(numel: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Where three slices of a weight meet: anywhere, at the ends of rows, and with nothing in a slice."""
    inner = [(5, 17), (1, numel - 1), (columns, 2 * columns), (columns + 1, columns + 2), (7, 7), (0, numel)]
    return [(0, min(start, numel), min(stop, numel), numel) for start, stop in inner]


@pytest.mark.parametrize("shape", [(6, 7), (42,), (1, 42), (42, 1)])
def test_slices_put_a_weight_together(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    shard = ShardedTensor.from_rank_offsets("w", weight, (0, 1, 3), replica_id=(0, 0, 5))
    flat = torch.arange(42.0)
    for cuts in _cuts(42, shape[-1] if len(shape) > 1 else 1):
        whole = torch.full(shard.global_shape, torch.nan)
        for start, stop in pairwise(cuts):
            parts = list(rectangles(shard, slice(start, stop), flat[start:stop]))
            assert len(parts) <= 3
            assert sum(part.data.numel() for part in parts) == stop - start
            for part in parts:
                part.validate_metadata_integrity()
                assert part.replica_id == (0, 0, 0)
                assert part.key == "w"
                assert part.data.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
                assert whole[part.global_slice()].isnan().all()
                whole[part.global_slice()] = part.data
        assert torch.equal(whole[shape[0] : 2 * shape[0]], flat.view(shape))
        assert whole[: shape[0]].isnan().all()


def test_a_fused_weight_is_cut_in_its_parts() -> None:
    """Gate and up lie one after the other in memory, and far apart in the saved tensor."""

    def build(key: str, whole: Tensor, replica_id: tuple[int, ...], _: slice | None) -> list[ShardedTensor]:
        offsets = ((0, 0, 4), (0, 2, 4))  # of tensor-parallel rank 0 of 2
        parts = zip(whole.chunk(2), offsets)
        return [ShardedTensor.from_rank_offsets(key, part, offset, replica_id=replica_id) for part, offset in parts]

    factory = ShardedTensorFactory("fc1", torch.zeros(8, 3), build, torch.cat, (0, 0, 1))
    assert [part.global_offset for part in pieces(factory)] == [(0, 0), (8, 0)]
    flat = torch.arange(24.0)
    found = [(part.global_offset, part.data.tolist()) for part in rectangles(factory, slice(8, 16), flat[8:16])]
    assert found == [
        ((2, 2), [[8.0]]),
        ((3, 0), [[9.0, 10.0, 11.0]]),
        ((8, 0), [[12.0, 13.0, 14.0]]),
        ((9, 0), [[15.0]]),
    ]

"""Scales are saved once each, on the grid of the whole weight, and every rank asks for all that it needs."""

from itertools import pairwise

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_step.checkpoint.scales import scale_tensors
from megatron_step.optim.slices import rectangles


@pytest.mark.parametrize("cuts", [[0, 360], [0, 50, 360], [0, 130, 135, 300, 360]])
def test_ranks_save_every_scale_once(cuts: list[int]) -> None:
    """A weight [3, 240]; its columns are split by two ranks, their flattened halves by `cuts`."""
    grid = torch.arange(12.0).view(3, 4).bfloat16()  # what the scale of each block should be
    saved, loaded = torch.zeros(3, 4), torch.zeros(3, 4)
    for tensor_rank in range(2):
        shard = ShardedTensor.from_rank_offsets("w", torch.zeros(3, 120), (1, tensor_rank, 2), replica_id=(0, 0, 0))
        for start, stop in pairwise(cuts):
            codes = list(rectangles(shard, slice(start, stop), torch.zeros(stop - start, dtype=torch.int8)))
            own = torch.cat([_scales_of(part, grid) for part in codes])
            for counts, saving in ((saved, True), (loaded, False)):
                for part in scale_tensors(codes, own, saving):
                    row, column = part.global_offset
                    place = slice(row, row + part.local_shape[0]), slice(column, column + part.local_shape[1])
                    assert torch.equal(part.data, grid[place])
                    assert (part.key, part.global_shape, part.dtype) == ("w", (3, 4), torch.bfloat16)
                    counts[place] += 1
    assert torch.equal(saved, torch.ones(3, 4))
    assert (loaded >= 1).all()
    assert (loaded[:, 1] >= 2).all(), "both tensor-parallel ranks hold a part of the block of columns 64 to 127"


def _scales_of(part: ShardedTensor, grid: torch.Tensor) -> torch.Tensor:
    """Scales of a rectangle's rows, one row after another."""
    (row, column), (rows, columns) = part.global_offset, part.local_shape
    return grid[row : row + rows, column // 64 : (column + columns - 1) // 64 + 1].flatten()

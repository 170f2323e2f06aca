"""Scales of 8-bit moments as sharded tensors, on the grid of the whole weight's blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_step.ops.moment_codes import block_count
from megatron_step.plan.states import MOMENT_BLOCK


def scale_tensors(codes: Sequence[ShardedTensor], scales: Tensor, saving: bool) -> Iterator[ShardedTensor]:
    """Yield the scales of the rectangles `codes` of a weight, one after another in `scales`, under the weight's key.

    A rectangle that begins within a block has that block's scale, too; with `saving` it leaves the scale to the rank
    that has the block's first element.
    """
    start = 0
    for rectangle in codes:
        *_, whole_rows, whole_columns = rectangle.global_shape
        first_row, first_column = rectangle.global_offset
        rows, columns = rectangle.local_shape
        blocks = block_count(columns, first_column)
        view = scales[start : start + rows * blocks].view(rows, blocks)
        start += rows * blocks
        left_out = int(saving and first_column % MOMENT_BLOCK > 0)
        if blocks > left_out:
            yield replace(
                rectangle,
                data=view[:, left_out:],
                dtype=torch.bfloat16,
                local_shape=(rows, blocks - left_out),
                global_shape=(whole_rows, -(-whole_columns // MOMENT_BLOCK)),
                global_offset=(first_row, first_column // MOMENT_BLOCK + left_out),
                axis_fragmentations=None,  # no regular grid
            )

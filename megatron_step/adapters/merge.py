"""Merge adapters into their base weights: W + s B A, computed in fp32 and rounded once."""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_step.layers.adapter import AdaptableLinear, Adapter
from megatron_step.layers.communication import all_gather


def add_product(piece: ShardedTensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """Add scaling B A to a piece of a weight in place, for the whole A [r, k] and B [n, r]; the piece is in fp32."""
    rows, columns = (slice(start, start + size) for start, size in zip(piece.global_offset, piece.data.shape))
    piece.data.addmm_(b[rows].float(), a[:, columns].float(), alpha=scaling)


@torch.no_grad()
def merge_adapter(linear: AdaptableLinear) -> None:
    """Add the adapter's product to the linear's weight, in place; the adapter does not change.

    Every rank of the tensor-parallel group must call it.
    """
    assert linear.adapter is not None
    a, b = whole_rank(linear.adapter)
    linear.weight.copy_(linear.weight.float().addmm_(b.float(), a.float(), alpha=linear.adapter.scaling))


def whole_rank(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return A and B of this rank's part of the weight, [r, k] and [n, r], gathered over the adapter's rank r."""
    a, b = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
    if adapter.split == "column":
        return all_gather(a, adapter.group)[0], b
    return a, all_gather(b.t(), adapter.group)[0].t()

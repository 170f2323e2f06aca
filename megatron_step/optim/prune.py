"""Sets the smallest part of optimizer states to zero, over tensors that are spread over ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_step.engine.device import current_device

_BITS = 31  # of a non-negative fp32 number; as an integer it is ordered as the number itself


@torch.no_grad()
def prune_moments(
    moments: Sequence[tuple[Tensor, Sequence[Tensor]]], share: float, groups: Sequence[torch.distributed.ProcessGroup]
) -> float:
    """Zero both of Adam's moments where the first is among the `share` smallest of its tensor, in place.

    `moments` are this rank's parts of the first moments in fp32, each with the stored tensors of first and second
    moments, whose zero is 0. They are in the same order on all ranks of `groups`, over which each tensor is split; a
    part may be empty. The thresholds are those of the whole tensors, so that every layout
    zeroes the same elements (magnitude pruning of ReLoRA, Lialin et al., 2023; the second moment goes with the first,
    for a large first over a small second would make a leap).

    Returns the share of the first moments' elements that are zero afterwards.
    """
    sizes = _total([first.numel() for first, _ in moments], groups)
    if share > 0 and sizes.sum() > 0:
        thresholds = _thresholds([_bits(first) for first, _ in moments], (sizes * share).floor(), groups)
        for (first, stored), threshold in zip(moments, thresholds.tolist()):
            smallest = _bits(first) <= threshold
            for tensor in stored:
                tensor.masked_fill_(smallest, 0)
    zeros = _total([stored[0].numel() - int(stored[0].count_nonzero()) for _, stored in moments], groups)
    return float(zeros.sum() / sizes.sum().clamp(min=1))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.abs().view(torch.int32)


def _thresholds(bits: Sequence[Tensor], counts: Tensor, groups: Sequence[torch.distributed.ProcessGroup]) -> Tensor:
    """For each tensor the smallest number that at least `counts` of its elements do not exceed; -1 for a count of 0."""
    low = torch.full_like(counts, -1, dtype=torch.int64)  # too few elements do not exceed it
    high = torch.full_like(low, 2**_BITS - 1)  # enough do not
    for _ in range(_BITS + 1):
        middle = (low + high) // 2
        counted = _total([int((part <= bound).sum()) for part, bound in zip(bits, middle.tolist())], groups)
        enough = counted >= counts
        high = torch.where(enough & (middle > low), middle, high)
        low = torch.where(enough, low, middle)
    return torch.where(counts > 0, high, -1)


def _total(values: Sequence[int], groups: Sequence[torch.distributed.ProcessGroup]) -> Tensor:
    """Sums over the ranks of all groups, in fp64, which counts exactly."""
    total = torch.tensor(values, dtype=torch.float64, device=current_device())
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return total.cpu()

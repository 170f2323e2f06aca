"""Collectives of tensor-parallel linears: over the sequence (first dimension) and over an adapter's rank (last)."""

import torch
from torch import Tensor

Group = torch.distributed.ProcessGroup


def all_gather(x: Tensor, group: Group, asynchronous: bool = False) -> tuple[Tensor, torch.distributed.Work | None]:
    """Gather the first dimension: [s / t, b, i] on each rank -> [s, b, i] on every rank.

    If `asynchronous`, call `wait()` on the returned work before using the result.
    """
    gathered = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    work = torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group, async_op=asynchronous)
    return gathered, work


def reduce_scatter(x: Tensor, group: Group) -> tuple[Tensor, torch.distributed.Work]:
    """Sum over ranks and scatter the first dimension: [s, b, i] on each rank -> [s / t, b, i] on each rank.

    Call `wait()` on the returned work before using the result.
    """
    scattered = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    work = torch.distributed.reduce_scatter_tensor(scattered, x.contiguous(), group=group, async_op=True)
    return scattered, work


def all_gather_last(u: Tensor, group: Group) -> Tensor:
    """Gather the last dimension: [..., r / t] on each rank -> [..., r] on every rank."""
    if group.size() == 1:
        return u
    gathered, _ = all_gather(u.unsqueeze(0), group)  # [t, ..., r / t]
    return gathered.movedim(0, -2).reshape(*u.shape[:-1], -1)


def reduce_scatter_last(u: Tensor, group: Group) -> Tensor:
    """Sum over ranks and scatter the last dimension: [..., r] on each rank -> [..., r / t] on each rank."""
    if group.size() == 1:
        return u
    shards = u.unflatten(-1, (group.size(), -1)).movedim(-2, 0)  # [t, ..., r / t]
    scattered, work = reduce_scatter(shards, group)
    work.wait()
    return scattered.squeeze(0)

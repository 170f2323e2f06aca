"""Tensor-parallel linears: megatron-core's column- and row-parallel layers on the product's own matrix products.

With weight W split over t ranks (Megatron-LM, Shoeybi et al., 2019; sequence parallelism, Korthikanti et al., 2022):

    column:  Y_i = X W_i^T              dX = sum_i dY_i W_i       W split by rows (outputs)
    row:     Y = sum_i X_i W_i^T        dX_i = dY W_i             W split by columns (inputs)

Under sequence parallelism X arrives split over the sequence and is gathered here; dX is reduce-scattered. The gathered
X is not kept: the backward pass gathers it again.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_step import ops


class _ParallelLinear(torch.autograd.Function):
    """y = x W^T (+ b) with the communication of a column-parallel linear overlapped with the products."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,  # [s, b, i], or [s / t, b, i] when gathered
        weight: Tensor,  # [o, i]
        bias: Tensor | None,  # [o]
        reduce_input_gradient: bool,
        gather_sequence: bool,
        group: torch.distributed.ProcessGroup | None,
    ) -> Tensor:
        # A frozen weight needs no gradient, so its input need not be kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.has_bias = bias is not None
        ctx.reduce_input_gradient = reduce_input_gradient
        ctx.gather_sequence = gather_sequence
        ctx.group = group
        total_x = _all_gather(x, group)[0] if gather_sequence else x
        y = ops.linear_output(total_x, weight)
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        gathering = None
        if needs_dweight and ctx.gather_sequence:
            x, gathering = _all_gather(x, ctx.group, asynchronous=True)
        dx = reducing = dweight = None
        if needs_dx:
            dx = ops.linear_input_gradient(dy, weight)
            if ctx.reduce_input_gradient:
                reducing = torch.distributed.all_reduce(dx, group=ctx.group, async_op=True)
            elif ctx.gather_sequence:
                dx, reducing = _reduce_scatter(dx, ctx.group)
        if needs_dweight:
            if gathering is not None:
                gathering.wait()
            dweight = ops.linear_weight_gradient(dy, x)
        dbias = dy.sum(dim=(0, 1)) if ctx.has_bias and needs_dbias else None
        if reducing is not None:
            reducing.wait()
        return dx, dweight, dbias, None, None, None


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """megatron-core's ColumnParallelLinear with `_ParallelLinear` as its arithmetic."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup,
        **unused: Any,
    ) -> Tensor:
        return _ParallelLinear.apply(input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """megatron-core's RowParallelLinear with `_ParallelLinear` as its arithmetic; the caller reduces the output."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **unused: Any) -> Tensor:
        return _ParallelLinear.apply(input, weight, bias, False, False, None)


def _all_gather(
    x: Tensor, group: torch.distributed.ProcessGroup, asynchronous: bool = False
) -> tuple[Tensor, torch.distributed.Work | None]:
    """[s / t, b, i] on each rank -> [s, b, i] on every rank."""
    gathered = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    work = torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group, async_op=asynchronous)
    return gathered, work


def _reduce_scatter(x: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, torch.distributed.Work]:
    """[s, b, i] on each rank -> the sum over ranks, [s / t, b, i] on each; done once the work is waited for."""
    scattered = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    work = torch.distributed.reduce_scatter_tensor(scattered, x.contiguous(), group=group, async_op=True)
    return scattered, work

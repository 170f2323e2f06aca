"""Tensor-parallel linears: megatron-core's column- and row-parallel layers with our own matrix products.

With weight W split over t ranks (Megatron-LM, Shoeybi et al., 2019; sequence parallelism, Korthikanti et al., 2022):

    column:  Y_i = X W_i^T              dX = sum_i dY_i W_i       W split by rows (outputs)
    row:     Y = sum_i X_i W_i^T        dX_i = dY W_i             W split by columns (inputs)

Under sequence parallelism X arrives split over the sequence. It is gathered here, and dX is reduce-scattered. The
gathered X is not kept: the backward pass gathers X again.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_step import ops
from megatron_step.engine.compat.models import multiplies
from megatron_step.layers.adapter import Split, adapter_linear
from megatron_step.layers.communication import all_gather, reduce_scatter
from megatron_step.plan.names import ADAPTER_A, ADAPTER_B


class _ParallelLinear(torch.autograd.Function):
    """y = x W^T (+ b) with autograd; communication overlaps with the matrix products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [s, b, i], or [s / t, b, i] when gathered
        weight: Tensor,  # [o, i]
        bias: Tensor | None,  # [o]
        reduce_input_gradient: bool,
        gather_sequence: bool,
        group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        # Only the weight's gradient needs x: with a frozen weight x is not kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.has_bias = bias is not None
        ctx.reduce_input_gradient = reduce_input_gradient
        ctx.gather_sequence = gather_sequence
        ctx.group = group
        total_x = all_gather(x, group)[0] if gather_sequence else x
        y = ops.linear_output(total_x, weight)
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        gathering = None
        if needs_dweight and ctx.gather_sequence:
            x, gathering = all_gather(x, ctx.group, asynchronous=True)
        dx = reducing = dweight = None
        if needs_dx:
            dx = ops.linear_input_gradient(dy, weight)
            if ctx.reduce_input_gradient:
                reducing = torch.distributed.all_reduce(dx, group=ctx.group, async_op=True)
            elif ctx.gather_sequence:
                dx, reducing = reduce_scatter(dx, ctx.group)
        if needs_dweight:
            if gathering is not None:
                gathering.wait()
            dweight = ops.linear_weight_gradient(dy, x)
        dbias = dy.sum(dim=(0, 1)) if ctx.has_bias and needs_dbias else None
        if reducing is not None:
            reducing.wait()
        return dx, dweight, dbias, None, None, None


@multiplies
class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """megatron-core's ColumnParallelLinear that computes by `_ParallelLinear` and can hold an adapter."""

    split: Split = "column"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register_module("adapter", None)

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup,
        **unused: Any,
    ) -> Tensor:
        """Compute X W_i^T (+ b): [s, b, i], or [s / t, b, i] if it is gathered -> [s, b, o / t]."""
        if self.adapter is not None:
            return adapter_linear(
                input,
                weight,
                bias,
                self.adapter,
                reduce_input_gradient=allreduce_dgrad,
                gather_sequence=sequence_parallel,
            )
        return _ParallelLinear.apply(input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return weight, bias, A and B, all split by rows."""
        axes = {"weight": 0, "bias": 0, ADAPTER_A: 0, ADAPTER_B: 0}
        return _sharded_state_dict(self, axes, prefix, sharded_offsets, metadata)


@multiplies
class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """megatron-core's RowParallelLinear that computes by `_ParallelLinear` and can hold an adapter."""

    split: Split = "row"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register_module("adapter", None)

    def multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None, **unused: Any) -> Tensor:
        """Compute X_i W_i^T, this rank's term of the sum over ranks: [s, b, i / t] -> [s, b, o]."""
        if self.adapter is not None:
            return adapter_linear(input, weight, bias, self.adapter)
        return _ParallelLinear.apply(input, weight, bias, False, False, self.tp_group)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return weight, A and B, all split by columns."""
        axes = {"weight": 1, ADAPTER_A: 1, ADAPTER_B: 1}
        return _sharded_state_dict(self, axes, prefix, sharded_offsets, metadata)


def _sharded_state_dict(
    linear: ColumnParallelLinear | RowParallelLinear, axes: dict[str, int], prefix: str, offsets: Any, metadata: Any
) -> dict[str, Any]:
    """Return the linear's sharded tensors; `axes` names the axis along which each tensor is split over ranks."""
    return make_sharded_tensors_for_checkpoint(
        linear.state_dict(prefix="", keep_vars=True),
        prefix,
        axes,
        offsets,
        tp_group=linear.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )

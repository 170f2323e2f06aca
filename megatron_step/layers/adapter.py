"""A low-rank adapter on a frozen tensor-parallel linear (LoRA, Hu et al., 2022): Y = X W^T + s drop(X) A^T B^T.

With rank r, s = alpha / r, and W, A and B split over t tensor-parallel ranks:

    column:  A_i [r / t, k]   B_i [n / t, r]    u_i = drop(X) A_i^T            u = u_1 ... u_t side by side
             Y_i = X W_i^T + s u B_i^T
    row:     A_i [r, k / t]   B_i [n, r / t]    u = sum_i drop(X_i) A_i^T      u_i = u's columns for B_i
             Y = sum_i (X_i W_i^T + s u_i B_i^T)

Ranks exchange u and the gradient of u, r numbers per token. A column-parallel linear gathers u and reduce-scatters its
gradient; a row-parallel linear reduce-scatters u and gathers its gradient. The adapter adds no other communication: its
outputs and input gradients join those of the linear, and each rank computes the whole gradient of its A_i and B_i. If
megatron-core keeps a float32 sum of gradients (`main_grad`), gradients are added to the sum unrounded.
"""

from typing import Any, Literal, Protocol

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_step import ops
from megatron_step.engine.device import current_device
from megatron_step.engine.microbatch_seed import microbatch_seed
from megatron_step.layers.communication import all_gather, all_gather_last, reduce_scatter, reduce_scatter_last

Group = torch.distributed.ProcessGroup
Split = Literal["column", "row"]
"""How a linear's weight is split over ranks: column by outputs, row by inputs."""


class Adapter(torch.nn.Module):
    """This rank's shards of A (`linear_in`) and B (`linear_out`). The adapter holds weights; its linear computes.

    Raises ValueError if `rank` is not divisible by the number of tensor-parallel ranks.
    """

    def __init__(
        self,
        split: Split,
        weight: Tensor,  # [n, k], this rank's shard of the linear's weight
        *,
        rank: int,
        alpha: float,
        dropout: float,
        site: int,
        group: Group,
    ) -> None:
        super().__init__()
        size, column = group.size(), split == "column"
        if rank % size:
            raise ValueError(f"adapter rank {rank} is not divisible by {size} tensor-parallel ranks: choose a multiple")
        n, k = weight.shape
        self.linear_in = _factor(rank // size if column else rank, k, weight.dtype)
        self.linear_out = _factor(n, rank if column else rank // size, weight.dtype)
        for factor, stride in ((self.linear_in, 1), (self.linear_out, getattr(weight, "partition_stride", 1))):
            set_tensor_model_parallel_attributes(factor.weight, True, 0 if column else 1, stride)
        self.split: Split = split
        self.group = group
        self.scaling = alpha / rank
        self.dropout = dropout
        self.site = site  # number of the adapter in the model, which its dropout depends on
        self.first_column = 0 if column else group.rank() * k
        self.num_columns = k if column else size * k

    def draw_dropout(self) -> ops.AdapterDropout | None:
        """Draw this micro-batch's mask from the micro-batch's seed and the adapter's site.

        The mask does not depend on the layout, and recompute draws the same one. None if nothing is dropped.
        """
        if self.dropout == 0.0 or not self.training:
            return None
        seed = (microbatch_seed() * 0x9E3779B1 + self.site * 0x85EBCA77) % (1 << 62)
        return ops.AdapterDropout(self.dropout, seed, self.first_column, self.num_columns)


class AdaptableLinear(Protocol):
    """A tensor-parallel linear that can hold an adapter."""

    split: Split
    weight: torch.nn.Parameter
    adapter: Adapter | None


def _factor(rows: int, columns: int, dtype: torch.dtype) -> torch.nn.Linear:
    """Return a linear whose weight [rows, columns] is uninitialised."""
    return torch.nn.utils.skip_init(torch.nn.Linear, columns, rows, bias=False, device=current_device(), dtype=dtype)


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter,
    *,
    reduce_input_gradient: bool = False,
    gather_sequence: bool = False,
) -> Tensor:
    """Apply the adapted linear on this rank: x [s, b, k], or [s / t, b, k] if it is gathered -> [s, b, n].

    `reduce_input_gradient` sums the input's gradient over ranks. `gather_sequence` gathers an input that is split over
    the sequence.
    """
    a, b = adapter.linear_in.weight, adapter.linear_out.weight
    dropout = adapter.draw_dropout()
    y: Tensor = _AdapterLinear.apply(x, weight, a, b, adapter, dropout, reduce_input_gradient, gather_sequence)
    return y if bias is None else y + bias


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [s, b, k], or [s / t, b, k] when gathered
        weight: Tensor,  # [n, k]
        a: Tensor,  # [r / t, k] or [r, k]
        b: Tensor,  # [n, r] or [n, r / t]
        adapter: Adapter,
        dropout: ops.AdapterDropout | None,
        reduce_input_gradient: bool,
        gather_sequence: bool,
    ) -> Tensor:
        total_x = all_gather(x, adapter.group)[0] if gather_sequence else x
        u = ops.adapter_shrink(total_x, a, dropout)
        u = (all_gather_last if adapter.split == "column" else reduce_scatter_last)(u, adapter.group)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.adapter, ctx.dropout = adapter, dropout
        ctx.reduce_input_gradient, ctx.gather_sequence = reduce_input_gradient, gather_sequence
        return ops.adapter_output(total_x, weight, u, b, adapter.scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, u = ctx.saved_tensors
        adapter, group = ctx.adapter, ctx.adapter.group
        a_weight, b_weight = adapter.linear_in.weight, adapter.linear_out.weight
        gathering = reducing = dx = None
        if ctx.gather_sequence:
            x, gathering = all_gather(x, group, asynchronous=True)
        du, db = ops.adapter_output_gradients(dy, u, b, adapter.scaling, dtype=_gradient_type(b_weight, dy))
        du = (reduce_scatter_last if adapter.split == "column" else all_gather_last)(du, group)
        if ctx.needs_input_grad[0]:
            dx = ops.adapter_input_gradient(dy, weight, du, a, ctx.dropout)
            if ctx.reduce_input_gradient:
                reducing = torch.distributed.all_reduce(dx, group=group, async_op=True)
            elif ctx.gather_sequence:
                dx, reducing = reduce_scatter(dx, group)
        if gathering is not None:
            gathering.wait()
        da = ops.adapter_shrink_gradient(du, x, ctx.dropout, _gradient_type(a_weight, dy))
        if reducing is not None:
            reducing.wait()
        return dx, None, _accumulated(a_weight, da), _accumulated(b_weight, db), None, None, None, None


def _gradient_type(weight: Tensor, dy: Tensor) -> torch.dtype:
    """Return the wider of two types: of dy, and of the weight's main_grad, or of the weight if it has none."""
    return torch.promote_types(getattr(weight, "main_grad", weight).dtype, dy.dtype)


def _accumulated(weight: Any, gradient: Tensor) -> Tensor:
    """Add a gradient to the weight's main_grad and return zeros for autograd, which megatron-core does not read.

    A weight without main_grad gets the gradient from autograd.
    """
    if not hasattr(weight, "main_grad"):
        return gradient
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)

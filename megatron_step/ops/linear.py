"""Linear map y = x Wᵀ and its two gradient products, each computed by the fastest library that is exact enough.

On the CPU, float32 products use oneDNN if the CPU has AVX-512, because oneDNN is then faster (figures in
csrc/README.md), and if their sums have at most 1,024 terms. oneDNN's longer sums, and all its sums without AVX-512, are
not exact enough, so those products use torch's BLAS. On other devices torch computes.

A bf16 weight may multiply an fp32 x: y and both gradients are in fp32. The weight is widened a block of rows at a time,
and each block is freed after its product, so that no fp32 copy of the weight is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.engine.compat.operations import onednn_linear
from megatron_step.ops.dispatch import use_kernel, use_onednn
from megatron_step.plan.states import WIDENED_ELEMENTS


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return y = x Wᵀ, with autograd.

    Args:
        x: [..., i]
        weight: [o, i], in the type of ``x``, or in bf16 for an fp32 ``x``

    Returns:
        [..., o]

    Raises:
        ValueError: shapes or types do not fit together.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or not types_agree(x, weight):
        raise ValueError(
            f"linear: x [..., i] and weight [o, i] must agree in i and type, got {x.dtype} {[*x.shape]} and "
            f"{weight.dtype} {[*weight.shape]}"
        )
    return _Linear.apply(x, weight)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``linear`` computed in plain torch."""
    return F.linear(x, weight.to(x.dtype))


def types_agree(x: Tensor, weight: Tensor) -> bool:
    """Return whether x can be multiplied by the weight: both have one type, or the weight is bf16 and x is fp32."""
    return x.dtype == weight.dtype or (x.dtype == torch.float32 and weight.dtype == torch.bfloat16)


def linear_output(x: Tensor, weight: Tensor) -> Tensor:
    """Return y = x Wᵀ [..., o] without autograd, for x [..., i] and weight [o, i]."""
    if _is_widened_by_blocks(x, weight):
        tokens = x.reshape(-1, x.shape[-1])
        y = x.new_empty((tokens.shape[0], weight.shape[0]))
        for block, wide in _widened_blocks(weight, x.dtype):
            if use_onednn(tokens, wide, terms=wide.shape[1]):
                y[:, block] = onednn_linear(tokens, wide)
            else:
                torch.mm(tokens, wide.t(), out=y[:, block])
        return y.view(*x.shape[:-1], weight.shape[0])
    weight = weight.to(x.dtype)
    if x.numel() > 0 and use_onednn(x, weight, terms=weight.shape[1]):
        return onednn_linear(x, weight)
    return F.linear(x, weight)


def linear_input_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Return dx = dy W [..., i], for dy = grad_output [..., o] and weight [o, i]."""
    if _is_widened_by_blocks(grad_output, weight):
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        dx = dy.new_zeros((dy.shape[0], weight.shape[1]))
        for block, wide in _widened_blocks(weight, dy.dtype):
            if use_onednn(dy, wide, terms=wide.shape[0]):
                dx += onednn_linear(dy[:, block], wide.t())
            else:
                dx.addmm_(dy[:, block], wide)
        return dx.view(*grad_output.shape[:-1], weight.shape[1])
    weight = weight.to(grad_output.dtype)
    if grad_output.numel() > 0 and use_onednn(grad_output, weight, terms=weight.shape[0]):
        return onednn_linear(grad_output, weight.t())
    return grad_output.matmul(weight)


def linear_weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """Return dW = dyᵀ x [o, i], summed over all leading dimensions, for dy = grad_output [..., o] and x [..., i]."""
    dy, x = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.numel() == 0 or not use_onednn(dy, x, terms=dy.shape[0]):
        return dy.t().mm(x)
    if dy.shape[1] > x.shape[1]:
        # oneDNN copies its operands into its own layout: the second one fast, the first one slowly. Pass the smaller
        # operand first.
        transposed = onednn_linear(x.t(), dy.t())
        return torch.ops.megatron_step.transpose(transposed) if use_kernel(transposed) else transposed.t().contiguous()
    return onednn_linear(dy.t(), x.t())


def _is_widened_by_blocks(x: Tensor, weight: Tensor) -> bool:
    """Return whether the weight is narrower than x, and too large to be widened at once."""
    return weight.dtype != x.dtype and weight.numel() > WIDENED_ELEMENTS


def _widened_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of a weight [o, i]: the slice of rows, and these rows in the wider type."""
    size = max(1, WIDENED_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], size):
        block = slice(first, first + size)
        yield block, weight[block].to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # Only the weight's gradient needs x, so x is not kept if the weight is frozen.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear_output(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = linear_input_gradient(grad_output, weight) if ctx.needs_input_grad[0] else None
        dweight = linear_weight_gradient(grad_output, x) if ctx.needs_input_grad[1] else None
        return dx, dweight

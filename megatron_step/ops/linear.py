"""Linear map y = x Wᵀ and its two gradient products, each computed by the fastest library that is exact enough.

On the CPU ``torch.mm`` computes float32 with torch's BLAS. With AVX-512 oneDNN is faster (figures in csrc/README.md),
so float32 uses oneDNN. Without AVX-512 long sums of oneDNN are not exact enough, so float32 uses the BLAS. On other
devices torch computes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.engine.compat.operations import onednn_linear
from megatron_step.ops.dispatch import use_kernel, use_onednn


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = x Wᵀ.

    Args:
        x: [..., i]
        weight: [o, i]

    Returns:
        [..., o]

    Raises:
        ValueError: shapes or types do not fit together.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"linear: x [..., i] and weight [o, i] must agree in i and type, got {x.dtype} {[*x.shape]} and "
            f"{weight.dtype} {[*weight.shape]}"
        )
    return _Linear.apply(x, weight)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``linear`` computed in plain torch."""
    return F.linear(x, weight)


def linear_output(x: Tensor, weight: Tensor) -> Tensor:
    """y = x Wᵀ without autograd: x [..., i], weight [o, i] -> [..., o]."""
    if x.numel() > 0 and use_onednn(x, weight):
        return onednn_linear(x, weight)
    return F.linear(x, weight)


def linear_input_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W: grad_output [..., o], weight [o, i] -> [..., i]."""
    if grad_output.numel() > 0 and use_onednn(grad_output, weight):
        return onednn_linear(grad_output, weight.t())
    return grad_output.matmul(weight)


def linear_weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """dW = dyᵀ x, summed over all leading dimensions: grad_output [..., o], x [..., i] -> [o, i]."""
    dy, x = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.numel() == 0 or not use_onednn(dy, x):
        return dy.t().mm(x)
    if dy.shape[1] > x.shape[1]:
        # oneDNN is fast at copying its second operand into its own layout, slow at the first: pass the smaller first.
        transposed = onednn_linear(x.t(), dy.t())
        return torch.ops.megatron_step.transpose(transposed) if use_kernel(transposed) else transposed.t().contiguous()
    return onednn_linear(dy.t(), x.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # Only the weight's gradient needs x: with a frozen weight x is not kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear_output(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = linear_input_gradient(grad_output, weight) if ctx.needs_input_grad[0] else None
        dweight = linear_weight_gradient(grad_output, x) if ctx.needs_input_grad[1] else None
        return dx, dweight

"""Root-mean-square norm: y = x / sqrt(mean(x²) + epsilon) * weight (Zhang and Sennrich, 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.ops.dispatch import use_kernel


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise the last dimension, in float32, and return the result in the type of ``x``.

    Args:
        x: [..., h]
        weight: [h], in the type of ``x`` or in float32; also in bfloat16 for a float32 ``x``
        epsilon: added to the mean square

    Raises:
        ValueError: ``weight`` is not a vector as long as the last dimension of ``x``.
    """
    if weight.dim() != 1 or x.dim() == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rms_norm: weight must be [h] for x [..., h], got {[*weight.shape]} and {[*x.shape]}")
    if x.numel() > 0 and use_kernel(x, weight):
        return _RMSNorm.apply(x, weight, epsilon)
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return rms_norm_reference(x, weight, epsilon)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``rms_norm`` computed in plain torch, in float32 or in the wider type of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """RMS norm with autograd; saves x, weight and rstd [rows], and computes only the gradients that are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, rstd = torch.ops.megatron_step.rms_norm_forward(x, _at_least(x, weight), epsilon)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_dx, need_dweight, _ = ctx.needs_input_grad
        x, weight, rstd = ctx.saved_tensors
        # The kernel returns dweight in the type of the weight that it was given.
        dx, dweight = torch.ops.megatron_step.rms_norm_backward(
            dy, x, _at_least(x, weight), rstd, need_dx, need_dweight
        )
        return dx if need_dx else None, dweight if need_dweight else None, None


def _at_least(x: Tensor, weight: Tensor) -> Tensor:
    """Return the weight [h] in the wider of the types of weight and x."""
    return weight.to(torch.promote_types(x.dtype, weight.dtype))

"""SwiGLU: y = silu(gate) * up for x = [gate | up] (Shazeer, 2020)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.ops.dispatch import use_kernel


def swiglu(x: Tensor) -> Tensor:
    """Apply the gated activation to the last dimension, saving only ``x`` for backward.

    Args:
        x: [..., 2f], the gate before the up projection

    Returns:
        [..., f] in the type of ``x``

    Raises:
        ValueError: the last dimension of ``x`` is not an even number above 0.
    """
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be [..., 2f] with f > 0, got {[*x.shape]}")
    return _SwiGLU.apply(x) if use_kernel(x) else swiglu_reference(x)


def swiglu_reference(x: Tensor) -> Tensor:
    """Return ``swiglu`` computed in plain torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.megatron_step.swiglu_forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.ops.megatron_step.swiglu_backward(dy, *ctx.saved_tensors)

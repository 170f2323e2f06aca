"""Causal self-attention: softmax(scale * q kᵀ, later keys masked) v, without the [s, s] matrix (Dao, 2023)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.ops.dispatch import use_kernel


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of n query heads over g groups of keys and values; query head i reads group i // (n / g).

    Args:
        q: [s, b, n, d], any strides
        k, v: [s, b, g, d], any strides
        scale: factor of q kᵀ; 1 / sqrt(d) if None

    Returns:
        [s, b, n * d] in the type of ``q``, contiguous. The CPU kernel computes all sums in float32.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check(q, k, v)
    s, b, n, d = q.shape
    scale = d**-0.5 if scale is None else scale
    if q.numel() > 0 and use_kernel(q, k, v):
        return _Attention.apply(q, k, v, scale).view(s, b, n * d)
    # [s, b, n, d] -> [b, n, s, d]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != n)
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Return ``attention`` computed in plain torch by the formula."""
    s, b, n, d = q.shape
    k, v = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * (d**-0.5 if scale is None else scale)
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v).reshape(s, b, n * d)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"attention: q must be [s, b, n, d], k and v [s, b, g, d], got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: q, k and v must share s, b and d, and n be a multiple of g, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}")


class _Attention(torch.autograd.Function):
    """Attention with autograd. It saves q, k, v, out and logsumexp [b, n, s], and recomputes the softmax by blocks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, logsumexp = torch.ops.megatron_step.attention_forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = torch.ops.megatron_step.attention_backward(dout, *ctx.saved_tensors, ctx.scale)
        return dq, dk, dv, None

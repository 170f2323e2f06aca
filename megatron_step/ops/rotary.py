"""Rotary position embedding by halves: y = x * cos + [-x₂ | x₁] * sin for x = [x₁ | x₂] (Su et al., 2021)."""

from typing import Any

import torch
from torch import Tensor

from megatron_step.ops.dispatch import use_kernel


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head by the angles of its position, in float32.

    Args:
        x: [s, b, n, d], any strides
        cos, sin: [s, d] float32, both halves of d filled in

    Returns:
        [s, b, n, d] in the type of ``x``, contiguous

    Raises:
        ValueError: a shape or type does not fit, or d is odd.
    """
    if x.dim() != 4:
        raise ValueError(f"rotary: x must be [s, b, n, d], got {[*x.shape]}")
    _check_angles("rotary", cos, sin, x.shape[0], x.shape[3])
    return _Rotary.apply(x, cos, sin) if use_kernel(x, cos, sin) else rotary_reference(x, cos, sin)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``rotary`` computed in plain torch."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None, None] + turned * sin[:, None, None]).to(x.dtype)


def split_qkv_rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_attention_heads: int, num_query_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split Megatron's fused projection into q, k and v, and rotate q and k.

    Args:
        qkv: [s, b, g * (n / g + 2) * d]; each of g query groups holds n / g queries, then a key, then a value
        cos, sin: [s, d] float32
        num_attention_heads: n
        num_query_groups: g

    Returns:
        q [s, b, n, d], k [s, b, g, d], v [s, b, g, d], contiguous

    Raises:
        ValueError: a shape or type does not fit.
    """
    n, g = num_attention_heads, num_query_groups
    if qkv.dim() != 3 or g < 1 or n % g or qkv.shape[2] % (n + 2 * g):
        raise ValueError(
            "split_qkv_rotary: qkv must be [s, b, (n + 2g) * d] with n a multiple of g, got "
            f"{[*qkv.shape]}, n = {n}, g = {g}"
        )
    _check_angles("split_qkv_rotary", cos, sin, qkv.shape[0], qkv.shape[2] // (n + 2 * g))
    if use_kernel(qkv, cos, sin):
        return _SplitQKVRotary.apply(qkv, cos, sin, n, g)
    return split_qkv_rotary_reference(qkv, cos, sin, num_attention_heads=n, num_query_groups=g)


def split_qkv_rotary_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_attention_heads: int, num_query_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``split_qkv_rotary`` computed in plain torch."""
    s, b, _ = qkv.shape
    per_group = num_attention_heads // num_query_groups
    grouped = qkv.view(s, b, num_query_groups, per_group + 2, -1)
    q = grouped[:, :, :, :per_group].reshape(s, b, num_attention_heads, -1)
    k, v = grouped[:, :, :, per_group], grouped[:, :, :, per_group + 1]
    return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin), v.contiguous()


def _check_angles(operation: str, cos: Tensor, sin: Tensor, s: int, d: int) -> None:
    if d % 2:
        raise ValueError(f"{operation}: the head size must be even, got {d}")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape != (s, d) or angles.dtype != torch.float32 or not angles.is_contiguous():
            raise ValueError(
                f"{operation}: {name} must be contiguous float32 [{s}, {d}], got {angles.dtype} {[*angles.shape]}"
            )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.ops.megatron_step.rotary(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.megatron_step.rotary(dy, *ctx.saved_tensors, True), None, None


class _SplitQKVRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, n: int, g: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return torch.ops.megatron_step.split_qkv_rotary_forward(qkv, cos, sin, n, g)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        dqkv = torch.ops.megatron_step.split_qkv_rotary_backward(dq, dk, dv, *ctx.saved_tensors)
        return dqkv, None, None, None, None

"""Shapes and types that the C++ kernels return, for torch.compile and FakeTensor; these functions do not compute."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_step.engine.compat.operations import argument_names
from megatron_step.ops.moment_codes import block_count


def adapter_dropout(x: Tensor, probability: float, seed: int, first_index: int, row_stride: int) -> Tensor:
    return x.new_empty(x.shape)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s, b, n, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, n, s), dtype=torch.float32)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def compact_adamw_(
    weight: Tensor,
    gradient: Tensor,
    remainder: Tensor | None,
    first: Tensor,
    second: Tensor,
    first_scale: Tensor | None,
    second_scale: Tensor | None,
    peaks: Tensor | None,
    gradient_factor: float,
    decay: float,
    beta1: float,
    beta2: float,
    root_factor: float,
    eps: float,
    step_size: float,
    seed: int,
    first_index: int,
    row_stride: int,
    first_column: int,
) -> None:
    return None


def compact_adamw_peaks(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    first_scale: Tensor | None,
    second_scale: Tensor | None,
    gradient_factor: float,
    beta1: float,
    beta2: float,
    first_column: int,
) -> Tensor:
    rows, columns = gradient.shape
    return gradient.new_empty((2, rows, block_count(columns, first_column)), dtype=torch.float32)


def cross_entropy_forward(logits: Tensor, labels: Tensor, columns: int) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float64)


def cross_entropy_backward_(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, gradient: Tensor, columns: int
) -> None:
    return None


def join_main(weight: Tensor, remainder: Tensor, second: Tensor) -> Tensor:
    return second.new_empty(second.shape)


def narrow_products(x: Tensor, left: Tensor, right: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(left.shape), x.new_empty(right.shape)


def rank_update_(target: Tensor, u: Tensor, factor: Tensor, scaling: float) -> None:
    return None


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.numel() // weight.numel(),), dtype=torch.float32)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else (0,)), weight.new_empty(weight.shape if need_dweight else (0,))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


def split_qkv_rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    s, b, width = qkv.shape
    d = width // (heads + 2 * groups)
    return qkv.new_empty((s, b, heads, d)), qkv.new_empty((s, b, groups, d)), qkv.new_empty((s, b, groups, d))


def split_qkv_rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    s, b, heads, d = dq.shape
    return dq.new_empty((s, b, (heads + 2 * dk.shape[2]) * d))


def split_main_(main: Tensor, weight: Tensor, remainder: Tensor, second: Tensor) -> None:
    return None


def swiglu_forward(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def transpose(matrix: Tensor) -> Tensor:
    return matrix.new_empty((matrix.shape[1], matrix.shape[0]))


def adapter_shrink(x: Tensor, a: Tensor, probability: float, seed: int, first_index: int, row_stride: int) -> Tensor:
    return x.new_empty((x.shape[0], a.shape[0]), dtype=torch.float32)


def adapter_expand(
    u: Tensor,
    factor: Tensor,
    rank_first: bool,
    scaling: float,
    probability: float,
    seed: int,
    first_index: int,
    row_stride: int,
) -> Tensor:
    return factor.new_empty((u.shape[0], factor.shape[1 if rank_first else 0]))


def adapter_output_gradients(dy: Tensor, u: Tensor | None, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    du = dy.new_empty((dy.shape[0], b.shape[1]), dtype=torch.float32)
    return du, b.new_empty((0,) if u is None else b.shape, dtype=torch.float32)


def adapter_shrink_gradient(
    du: Tensor, x: Tensor, probability: float, seed: int, first_index: int, row_stride: int
) -> Tensor:
    return du.new_empty((du.shape[1], x.shape[1]))


FAKES: tuple[Callable[..., Any], ...] = (
    adapter_dropout,
    attention_forward,
    attention_backward,
    compact_adamw_,
    compact_adamw_peaks,
    cross_entropy_forward,
    cross_entropy_backward_,
    join_main,
    narrow_products,
    rank_update_,
    rms_norm_forward,
    rms_norm_backward,
    rotary,
    split_qkv_rotary_forward,
    split_qkv_rotary_backward,
    split_main_,
    swiglu_forward,
    swiglu_backward,
    transpose,
)
CUDA_FAKES: tuple[Callable[..., Any], ...] = (
    adapter_shrink,
    adapter_expand,
    adapter_output_gradients,
    adapter_shrink_gradient,
)


def unknown_kernels() -> list[str]:
    """Return the kernels that the loaded extension lacks or defines with other arguments, as one from other sources."""
    return [
        fake.__name__
        for fake in FAKES
        if argument_names(f"megatron_step::{fake.__name__}") != list(inspect.signature(fake).parameters)
    ]


def register_fakes() -> None:
    """Register the output shapes of every kernel in torch; call it once, after the extension is loaded."""
    for fake in FAKES + CUDA_FAKES:
        torch.library.register_fake(f"megatron_step::{fake.__name__}", fake)

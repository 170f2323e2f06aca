"""Linear with a frozen weight and a trainable low-rank adapter (LoRA, Hu et al., 2022): y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ.

It is split into functions, because tensor-parallel ranks exchange u and the gradient of u between them:

    forward    u  = drop(x) Aᵀ                        adapter_shrink
               y  = x Wᵀ + s u Bᵀ                     adapter_output
    backward   du = s dy B,  dB = s dyᵀ u             adapter_output_gradients
               dx = dy W + mask * (du A)              adapter_input_gradient
               dA = duᵀ drop(x)                       adapter_shrink_gradient

The adapter's products cost little arithmetic. A graph of separate operations would add temporary tensors of the size of
x and y, which take time for passes over memory and for new memory pages. So these functions add the adapter's product
in place to the frozen weight's product. They draw the dropout mask again wherever they need it, a block of rows at a
time. On a GPU the kernels of ``adapter_kernels.py`` compute the adapter's products. ``adapter_linear`` is the whole
operation, with checks and autograd; the functions of the table have neither.

W, A and B may be bf16 for an fp32 x. Each of them is widened only during its product, and all results are in fp32.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.ops import adapter_kernels
from megatron_step.ops.adapter_dropout import AdapterDropout, drop, dropout_mask_reference
from megatron_step.ops.dispatch import use_cuda_kernel, use_kernel, use_onednn
from megatron_step.ops.linear import linear_input_gradient, linear_output, types_agree

_BLOCK_ELEMENTS = 2**18
_KERNEL_RANK = 32  # up to this rank, one pass over dy for du and dB is faster than two products


def adapter_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: AdapterDropout | None = None
) -> Tensor:
    """Return y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ on one rank, and keep only x and u for backward.

    Args:
        x: [..., k]
        weight: [n, k], frozen; weight, a and b are in the type of ``x``, or in bf16 for an fp32 ``x``
        a: [r, k]
        b: [n, r]
        scaling: s, the adapter's alpha / rank
        dropout: mask over the adapter's input; None drops nothing

    Returns:
        [..., n]

    Raises:
        ValueError: shapes or types do not fit together, or the weight is not frozen.
    """
    _check(x, weight, a, b, dropout)
    return _AdapterLinear.apply(x, weight, a, b, scaling, dropout)


def adapter_linear_reference(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: AdapterDropout | None = None
) -> Tensor:
    """Return ``adapter_linear`` computed in plain torch."""
    dropped = x if dropout is None else (x * dropout_mask_reference(x.shape, dropout, x.device)).to(x.dtype)
    weight, a, b = (factor.to(x.dtype) for factor in (weight, a, b))
    return F.linear(x, weight) + scaling * F.linear(F.linear(dropped, a), b)


def adapter_shrink(x: Tensor, a: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """Return u = drop(x) Aᵀ [..., r] for x [..., k] and a [r, k], in float32, or in float64 for a float64 x.

    If the columns of x are split over tensor-parallel ranks, the caller sums u over them.
    """
    rows, a = _rows(x), a.to(x.dtype)
    if use_cuda_kernel(rows):
        return adapter_kernels.shrink(rows, a, dropout).view(*x.shape[:-1], a.shape[0])
    u = [linear_output(_drop(rows, block, dropout), a) for block in _blocks(rows, dropout)]
    return (u[0] if len(u) == 1 else torch.cat(u)).to(_wide(x.dtype)).view(*x.shape[:-1], a.shape[0])


def adapter_output(x: Tensor, weight: Tensor, u: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return y = x Wᵀ + s u Bᵀ [..., n] in the type of x, for x [..., k], weight [n, k], u [..., r] and b [n, r].

    If B is 0, y equals x Wᵀ bit for bit.
    """
    b = b.to(x.dtype)
    if use_cuda_kernel(x):
        y = adapter_kernels.output(_rows(x), weight.to(x.dtype), _rows(u), b, scaling)
    else:
        y = _rank_update_(linear_output(_rows(x), weight), _rows(u), b.t(), scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


@overload
def adapter_output_gradients(
    dy: Tensor, u: Tensor, b: Tensor, scaling: float, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def adapter_output_gradients(
    dy: Tensor,
    u: Tensor | None,
    b: Tensor,
    scaling: float,
    need_du: bool = True,
    need_db: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]: ...
def adapter_output_gradients(
    dy: Tensor,
    u: Tensor | None,
    b: Tensor,
    scaling: float,
    need_du: bool = True,
    need_db: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return du = s dy B and dB = s dyᵀ u, each None if the caller does not need it.

    Args:
        dy: [..., n]
        u: [..., r]; only dB needs u
        b: [n, r]
        scaling: s
        need_du: whether the caller needs du
        need_db: whether the caller needs dB
        dtype: type of dB; None takes the type of dy

    Returns:
        du [..., r] in float32 (float64 for a float64 dy), dB [n, r]
    """
    dtype, b = dy.dtype if dtype is None else dtype, b.to(dy.dtype)
    narrow = _rows(u) if u is not None and need_db else None  # [tokens, r]
    if use_cuda_kernel(dy):
        du, db = adapter_kernels.output_gradients(_rows(dy), narrow, b, scaling)
        return du.view(*dy.shape[:-1], b.shape[1]), None if narrow is None else db.to(dtype)
    if need_du and narrow is not None and b.shape[1] <= _KERNEL_RANK and _use_kernel(dy, narrow, b):
        du, db = torch.ops.megatron_step.narrow_products(_rows(dy), narrow, b, scaling)
        return du.view(*dy.shape[:-1], b.shape[1]), db.to(dtype)
    return (
        linear_input_gradient(dy, b).to(_wide(dy.dtype)).mul_(scaling) if need_du else None,
        None if narrow is None else _sum_over_rows((narrow * scaling).to(dy.dtype), _rows(dy)).t().to(dtype),
    )


def adapter_input_gradient(dy: Tensor, weight: Tensor, du: Tensor, a: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """Return dx = dy W + mask * (du A) [..., k] in the type of dy; without dropout the mask is 1.

    The shapes are dy [..., n], weight [n, k], du [..., r] and a [r, k].
    """
    a = a.to(dy.dtype)
    if use_cuda_kernel(dy):
        dx = adapter_kernels.input_gradient(_rows(dy), weight.to(dy.dtype), _rows(du), a, dropout)
    else:
        dx, du = linear_input_gradient(_rows(dy), weight), _rows(du)
        if dropout is None:
            _rank_update_(dx, du, a)
        else:
            du = du.to(dy.dtype)
            for block in _blocks(dx, dropout):
                dx[block] += drop(linear_input_gradient(du[block], a), dropout, block.start)
    return dx.view(*dy.shape[:-1], weight.shape[1])


def adapter_shrink_gradient(du: Tensor, x: Tensor, dropout: AdapterDropout | None, dtype: torch.dtype) -> Tensor:
    """Return dA = duᵀ drop(x) [r, k] in ``dtype``, for du [..., r] and x [..., k]."""
    if use_cuda_kernel(x):
        return adapter_kernels.shrink_gradient(_rows(du), _rows(x), dropout).to(dtype)
    rows, narrow = _rows(x), _rows(du).to(x.dtype)
    sums = (_sum_over_rows(narrow[block], _drop(rows, block, dropout)) for block in _blocks(rows, dropout))
    return reduce(Tensor.add_, (da.to(du.dtype) for da in sums)).to(dtype)


def _drop(rows: Tensor, block: slice, dropout: AdapterDropout | None) -> Tensor:
    """Return a block of rows of mask * x."""
    return rows[block] if dropout is None else drop(rows[block], dropout, block.start)


def _blocks(rows: Tensor, dropout: AdapterDropout | None) -> Iterator[slice]:
    """Return slices over the rows of x [tokens, k]: with dropout on the CPU, blocks whose masked copy fits the cache.

    A masked copy of all rows at once would take more time for new memory pages than for arithmetic.
    """
    tokens = rows.shape[0]
    whole = dropout is None or rows.device.type != "cpu"
    size = max(tokens if whole else _BLOCK_ELEMENTS // rows.shape[1], 1)
    return (slice(first, min(first + size, tokens)) for first in range(0, max(tokens, 1), size))


def _rank_update_(target: Tensor, u: Tensor, factor: Tensor, scaling: float = 1.0) -> Tensor:
    """Add s u factor to the target [tokens, n] in place, for u [tokens, r] and factor [r, n]; return the target."""
    if _use_kernel(target, u, factor):
        torch.ops.megatron_step.rank_update_(target, u, factor, scaling)
        return target
    return target.addmm_((u if scaling == 1.0 else u * scaling).to(target.dtype), factor)


def _use_kernel(*tensors: Tensor) -> bool:
    """Return whether the CPU's kernels for the adapter's products take these tensors; they take float32 only."""
    return all(tensor.dtype == torch.float32 for tensor in tensors) and use_kernel(*tensors)


def _sum_over_rows(narrow: Tensor, wide: Tensor) -> Tensor:
    """Return narrowᵀ wide [r, k], for narrow [tokens, r] and wide [tokens, k]."""
    if wide.device.type != "cpu" or use_onednn(narrow, wide, terms=narrow.shape[0]):
        # A transposed copy is small and makes the product faster.
        return linear_output(narrow.t().contiguous(), wide.t())
    # With few columns the BLAS adds terms one by one, which is slow and less exact.
    return narrow.t().mm(wide) if narrow.shape[1] <= wide.shape[1] else wide.t().mm(narrow).t()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    """Return x [..., k] as [tokens, k]; a view if x is contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dropout: AdapterDropout | None) -> None:
    operands = {"x [..., k]": x, "weight [n, k]": weight, "a [r, k]": a, "b [n, r]": b}
    fits = x.dim() > 0 and weight.dim() == a.dim() == b.dim() == 2 and a.shape[0] > 0
    fits = fits and weight.shape[1] == a.shape[1] == x.shape[-1] and b.shape == (weight.shape[0], a.shape[0])
    fits = fits and all(types_agree(x, factor) and factor.device == x.device for factor in (weight, a, b))
    if not fits:
        got = ", ".join(f"{name} is {t.dtype} {[*t.shape]} on {t.device}" for name, t in operands.items())
        raise ValueError(f"adapter_linear: operands must agree in k, n, r > 0, type and device: {got}")
    if weight.requires_grad:
        raise ValueError(
            "adapter_linear: the weight requires a gradient, but must be frozen: call requires_grad_(False)"
        )
    if dropout is not None:
        dropout.check_columns(x.shape[-1])


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: AdapterDropout | None
    ) -> Tensor:
        u = adapter_shrink(x, a, dropout)
        # Only dA needs x, and only dB needs u.
        need_x, need_u = ctx.needs_input_grad[2:4]
        ctx.save_for_backward(x if need_x else None, weight, a, b, u if need_u else None)
        ctx.scaling, ctx.dropout = scaling, dropout
        return adapter_output(x, weight, u, b, scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, u = ctx.saved_tensors
        need_dx, _, need_da, need_db = ctx.needs_input_grad[:4]
        du, db = adapter_output_gradients(dy, u, b, ctx.scaling, need_dx or need_da, need_db)
        dx = da = None
        if du is not None and need_dx:
            dx = adapter_input_gradient(dy, weight, du, a, ctx.dropout)
        if du is not None and need_da:
            da = adapter_shrink_gradient(du, x, ctx.dropout, x.dtype)
        return dx, None, da, db, None, None

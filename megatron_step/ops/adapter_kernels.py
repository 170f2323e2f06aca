"""The adapter linear on a GPU: kernels of csrc/ compute the adapter's products, cuBLAS the frozen weight's.

    forward    u  = drop(x) Aᵀ                        shrink
               y  = (s u Bᵀ) + x Wᵀ                   output
    backward   du = s dy B,  dB = s dyᵀ u             output_gradients: one pass over dy
               dx = (mask * (du A)) + dy W            input_gradient
               dA = duᵀ drop(x)                       shrink_gradient

A kernel first writes the product in brackets. cuBLAS then adds the large product to this result. Arithmetic bounds the
time of the large product, so the extra read is free. The kernels draw the masks. x [t, k], dy [t, n], weight [n, k],
a [r, k] and b [n, r] have one type; u and du [t, r] are float32.
"""

import torch
from torch import Tensor

from megatron_step.ops.adapter_dropout import AdapterDropout


def shrink(x: Tensor, a: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """Return u = drop(x) Aᵀ [t, r] in float32, for x [t, k] and a [r, k]."""
    operators = torch.ops.megatron_step
    return operators.adapter_shrink(x.contiguous(), a.contiguous(), *_draw(dropout, x.shape[1]))


def output(x: Tensor, weight: Tensor, u: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return y = x Wᵀ + s u Bᵀ [t, n], for x [t, k], weight [n, k], u [t, r] and b [n, r]."""
    operators = torch.ops.megatron_step
    y = operators.adapter_expand(u.contiguous(), b.contiguous(), False, scaling, *_draw(None, b.shape[0]))
    return y.addmm_(x, weight.t())


def output_gradients(dy: Tensor, u: Tensor | None, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return du = s dy B [t, r] and dB = s dyᵀ u [n, r] in float32; without u, dB is empty."""
    operators = torch.ops.megatron_step
    contiguous_u = None if u is None else u.contiguous()
    return operators.adapter_output_gradients(dy.contiguous(), contiguous_u, b.contiguous(), scaling)


def input_gradient(dy: Tensor, weight: Tensor, du: Tensor, a: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """Return dx = mask * (du A) + dy W [t, k], for dy [t, n], weight [n, k], du [t, r] and a [r, k]."""
    operators = torch.ops.megatron_step
    dx = operators.adapter_expand(du.contiguous(), a.contiguous(), True, 1.0, *_draw(dropout, a.shape[1]))
    return dx.addmm_(dy, weight)


def shrink_gradient(du: Tensor, x: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """Return dA = duᵀ drop(x) [r, k] in float32, for du [t, r] and x [t, k]."""
    operators = torch.ops.megatron_step
    return operators.adapter_shrink_gradient(du.contiguous(), x.contiguous(), *_draw(dropout, x.shape[1]))


def _draw(dropout: AdapterDropout | None, columns: int) -> tuple[float, int, int, int]:
    """Return probability, seed, index of the first element and indices per row of the dropout on x [t, columns]."""
    if dropout is None:
        return 0.0, 0, 0, columns
    dropout.check_columns(columns)
    return dropout.probability, dropout.seed, dropout.first_column, dropout.num_columns

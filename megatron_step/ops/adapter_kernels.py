"""The pieces of the adapter linear on a GPU: the adapter's products by the kernels of csrc/, the frozen one by cuBLAS.

    forward    u  = drop(x) Aᵀ                        shrink
               y  = (s u Bᵀ) + x Wᵀ                   output
    backward   du = s dy B,  dB = s dyᵀ u             output_gradients: one pass over dy
               dx = (mask * (du A)) + dy W            input_gradient
               dA = duᵀ drop(x)                       shrink_gradient

The product in brackets is written first; the large one, which computes far longer than it reads, adds itself to that.
Masks are drawn in the kernels. x [t, k], dy [t, n], weight [n, k], a [r, k], b [n, r] are of one type, u and du [t, r]
float32.
"""

import torch
from torch import Tensor

from megatron_step.ops.adapter_dropout import AdapterDropout


def shrink(x: Tensor, a: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """u [t, r], float32."""
    operators = torch.ops.megatron_step
    return operators.adapter_shrink(x.contiguous(), a.contiguous(), *_draw(dropout, x.shape[1]))


def output(x: Tensor, weight: Tensor, u: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y [t, n]."""
    operators = torch.ops.megatron_step
    y = operators.adapter_expand(u.contiguous(), b.contiguous(), False, scaling, *_draw(None, b.shape[0]))
    return y.addmm_(x, weight.t())


def output_gradients(dy: Tensor, u: Tensor | None, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """du [t, r] and dB [n, r], float32; without u dB is empty."""
    operators = torch.ops.megatron_step
    contiguous_u = None if u is None else u.contiguous()
    return operators.adapter_output_gradients(dy.contiguous(), contiguous_u, b.contiguous(), scaling)


def input_gradient(dy: Tensor, weight: Tensor, du: Tensor, a: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """dx [t, k]."""
    operators = torch.ops.megatron_step
    dx = operators.adapter_expand(du.contiguous(), a.contiguous(), True, 1.0, *_draw(dropout, a.shape[1]))
    return dx.addmm_(dy, weight)


def shrink_gradient(du: Tensor, x: Tensor, dropout: AdapterDropout | None) -> Tensor:
    """dA [r, k], float32."""
    operators = torch.ops.megatron_step
    return operators.adapter_shrink_gradient(du.contiguous(), x.contiguous(), *_draw(dropout, x.shape[1]))


def _draw(dropout: AdapterDropout | None, columns: int) -> tuple[float, int, int, int]:
    """Probability, seed, index of the first element and indices from row to row, for an x of this many columns."""
    if dropout is None:
        return 0.0, 0, 0, columns
    dropout.check_columns(columns)
    return dropout.probability, dropout.seed, dropout.first_column, dropout.num_columns

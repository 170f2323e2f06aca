"""Rows of an embedding table, y[t] = W[index[t]], in a type that may be wider than the table's."""

from typing import Any

import torch
from torch import Tensor


def embedding(index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Look rows up and return them in ``dtype``. The weight's gradient is summed in ``dtype``, too.

    Args:
        index: [...] int64, below v
        weight: [v, h]
        dtype: type of the result

    Returns:
        [..., h]
    """
    return _Embedding.apply(index, weight, dtype)


def embedding_reference(index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``embedding`` computed in plain torch, from a copy of the whole table."""
    return weight.to(dtype)[index]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = weight.shape[0]
        return weight.index_select(0, index.reshape(-1)).to(dtype).view(*index.shape, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        (index,) = ctx.saved_tensors
        # dW[v] = sum of dy[t] over the t whose index is v.
        return None, torch.ops.aten.embedding_dense_backward(dy, index, ctx.rows, -1, False), None

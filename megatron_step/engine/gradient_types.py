"""Gradients that are wider than their weights, so that autograd does not round them on their way to a buffer."""

import torch
from torch import Tensor


def check_gradient_types() -> None:
    """Raise ValueError if this torch gives every gradient the type of its weight."""
    if not hasattr(Tensor, "grad_dtype"):
        raise ValueError(
            f"training.precision bf16_weights needs fp32 gradients of bf16 weights, which torch {torch.__version__} "
            "lacks: install torch 2.10 or later, or set training.precision to bf16 or fp32"
        )


def keep_gradient_type(weight: Tensor, dtype: torch.dtype) -> None:
    """Let autograd hand out the weight's gradient in `dtype`, in place; tied uses are summed in it."""
    if weight.dtype != dtype:
        weight.grad_dtype = dtype

"""Tensors in the formats of plan/states.py: fp32 values are encoded into a format, and decoded from it.

A format without scales is a type of torch. Formats with scales (8 bits) exist in plans only; training with one begins
with its branches in `encode` and `decode`.
"""

import torch
from torch import Tensor

from megatron_step.plan.states import BF16, FP32, Format

_TYPES = {FP32: torch.float32, BF16: torch.bfloat16}


def tensor_type(format: Format) -> torch.dtype:
    """Return the type of torch that holds the format.

    Raises ValueError if none does.
    """
    if format not in _TYPES:
        raise ValueError(f"{format} exists in plans only: training keeps states in fp32 or bf16")
    return _TYPES[format]


def encode(values: Tensor, format: Format) -> Tensor:
    """Round fp32 `values` to the format; returns `values` themselves where nothing is rounded.

    Raises ValueError for a format of plans.
    """
    return values.to(tensor_type(format))


def decode(stored: Tensor) -> Tensor:
    """Return the fp32 values of a stored tensor; returns `stored` itself where it is fp32."""
    return stored.float()

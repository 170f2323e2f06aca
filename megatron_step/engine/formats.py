"""Tensors in the formats of plan/states.py: fp32 values are encoded into a format, and decoded from it.

`encode` and `decode` are for formats of one tensor. Main weights in parts are encoded by ops/main_weight.py, moments in
8 bits, which have scales, by ops/moment_codes.py.
"""

import torch
from torch import Tensor

from megatron_step.plan.states import (
    BF16,
    CORRECTION_BITS,
    FP32,
    REMAINDER_BITS,
    SIGNED_BLOCKS,
    UNSIGNED_BLOCKS,
    Format,
)

_TYPES = {
    FP32: torch.float32,
    BF16: torch.bfloat16,
    REMAINDER_BITS: torch.int16,
    CORRECTION_BITS: torch.int8,
    SIGNED_BLOCKS: torch.int8,
    UNSIGNED_BLOCKS: torch.uint8,
}


def tensor_type(format: Format) -> torch.dtype:
    """Return the type of torch that holds the numbers of a format, without its scales.

    Raises ValueError if none does.
    """
    if format not in _TYPES:
        raise ValueError(f"{format} exists in plans only: training does not keep states in it")
    return _TYPES[format]


def encode(values: Tensor, format: Format) -> Tensor:
    """Round fp32 `values` to fp32 or bf16; returns `values` themselves where nothing is rounded.

    Raises ValueError for another format.
    """
    dtype = tensor_type(format)
    if format not in (FP32, BF16):
        raise ValueError(f"{format} is not a format of one tensor")
    return values.to(dtype)


def decode(stored: Tensor) -> Tensor:
    """Return the fp32 values of a stored tensor; returns `stored` itself where it is fp32."""
    return stored.float()

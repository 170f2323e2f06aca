"""Main weights beside bf16 weights: 16-bit remainders, 8-bit corrections, or stochastic rounding alone.

An fp32 number's upper 16 bits are nearly its bf16 value, so the bf16 weight and 16 more bits hold the main weight:

    bits(main) = (bits(weight) << 16) + remainder,    weight = main rounded to nearest, remainder signed

The direction of a tie decides whether the remainder fits. Rounded away from zero, every remainder is from -2^15 to
2^15 - 1 (`split_remainder`). Rounded to even, as bf16 training does, a tie that rounds down leaves +2^15. Then
`split_main_` keeps 2^15 - 1 and sets the sign of the second moment, which is never negative.
A correction is a remainder's upper 8 bits; the main weight is first rounded to 24 bits stochastically.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_step.ops.dispatch import use_kernel

_LARGEST = 2**15 - 1
_EXPONENT = 0x7F800000


def join_main(weight: Tensor, remainder: Tensor, second: Tensor) -> Tensor:
    """Return the fp32 main weights that `split_main_` kept, bit for bit, and clear the signs of `second` in place.

    Shapes are equal: bf16 weights, int16 remainders, fp32 second moments, all contiguous.
    """
    if use_kernel(weight, second):
        return torch.ops.megatron_step.join_main(weight, remainder, second)
    second_bits = second.view(torch.int32)
    tie = second_bits < 0
    second_bits.bitwise_and_(0x7FFFFFFF)
    return _from_bits(_weight_bits(weight) + remainder.int() + tie.int())


def split_main_(main: Tensor, weight: Tensor, remainder: Tensor, second: Tensor) -> None:
    """Write fp32 main weights into bf16 weights, int16 remainders and the signs of fp32 second moments, in place.

    Each second moment must be at least 0. The weights are rounded to nearest even.
    """
    if use_kernel(main, weight):
        torch.ops.megatron_step.split_main_(main, weight, remainder, second)
        return
    weight.copy_(main)
    # A NaN's remainder is any number of 16 bits: with all of them it stays NaN.
    difference = (main.view(torch.int32) - _weight_bits(weight)).clamp(-_LARGEST - 1, _LARGEST + 1)
    remainder.copy_(difference.clamp(max=_LARGEST))
    second.view(torch.int32).bitwise_or_((difference > _LARGEST).int() << 31)


def read_main(weight: Tensor, rest: Tensor | None) -> Tensor:
    """Return the fp32 main weights of weights and the bits `rest` that they lack: int16, int8, or None.

    fp32 weights, which lack nothing, are returned themselves.
    """
    if rest is None:
        return weight.float()
    return add_remainder(weight, rest) if rest.dtype == torch.int16 else add_correction(weight, rest)


def write_main_(main: Tensor, weight: Tensor, rest: Tensor | None, draw: Callable[[], Tensor]) -> None:
    """Write fp32 main weights into weights and `rest` as `read_main` takes them, in place.

    What they have no room for is rounded stochastically, by the 32 random bits of each element that `draw` returns.
    """
    if weight.dtype == torch.float32:
        weight.copy_(main)
        return
    if rest is None:
        weight.copy_(round_stochastically(main, draw() >> 16))
        return
    if rest.dtype == torch.int16:
        upper, lower = split_remainder(main)
    else:
        upper, lower = split_correction(main, draw() >> 24)
    weight.copy_(upper)
    rest.copy_(lower)


def split_remainder(main: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bf16 weights and the int16 remainders of fp32 main weights; ties round away from zero."""
    bits = main.view(torch.int32)
    return _upper_half(main, bits), torch.where(_finite(bits), bits, 0).to(torch.int16)


def add_remainder(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 main weights of bf16 weights and int16 remainders."""
    return _from_bits(_weight_bits(weight) + remainder.int())


def remainder_of(main: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int16 remainders of fp32 main weights beside given bf16 weights, and which lack 1 to be exact.

    `weight` is `main` rounded to nearest, ties in any direction; else the remainder is the nearest that there is.
    """
    difference = main.view(torch.int32) - _weight_bits(weight)
    remainder = difference.clamp(-_LARGEST - 1, _LARGEST)
    return remainder.to(torch.int16), difference == _LARGEST + 1


def correction_of(main: Tensor, weight: Tensor) -> Tensor:
    """Return the int8 corrections of fp32 main weights beside given bf16 weights, rounded to nearest."""
    difference = main.view(torch.int32) - _weight_bits(weight)
    return ((difference + 0x80) >> 8).clamp(-(2**7), 2**7 - 1).to(torch.int8)


def split_correction(main: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bf16 weights and the int8 corrections of fp32 main weights, first rounded to 24 bits.

    `random` numbers are from 0 to 2^8 - 1; a main weight is rounded away from zero if its last 8 bits and they carry.
    """
    bits = main.view(torch.int32)
    rounded = (bits + random.int()) & -0x100
    return _upper_half(main, rounded), (torch.where(_finite(bits), rounded, 0) >> 8).to(torch.int8)


def add_correction(weight: Tensor, correction: Tensor) -> Tensor:
    """Return the fp32 main weights of bf16 weights and int8 corrections."""
    return _from_bits(_weight_bits(weight) + (correction.int() << 8))


def round_stochastically(main: Tensor, random: Tensor) -> Tensor:
    """Round fp32 values to bf16, up or down at random; infinities and NaN stay.

    `random` numbers are from 0 to 2^16 - 1; a value is rounded away from zero if its lower half and they carry.
    """
    bits = main.view(torch.int32)
    rounded = _from_bits((bits + random.int()) & -0x10000)
    return torch.where(_finite(bits), rounded, main).bfloat16()


def _upper_half(main: Tensor, bits: Tensor) -> Tensor:
    """Round bits of fp32 numbers to bf16, ties away from zero; infinities and NaN of `main` stay."""
    rounded = _from_bits((bits + 0x8000) & -0x10000)
    return torch.where(_finite(main.view(torch.int32)), rounded, main).bfloat16()


def _finite(bits: Tensor) -> Tensor:
    return (bits & _EXPONENT) != _EXPONENT


def _weight_bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16).int() << 16


def _from_bits(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)

"""Main weights come back from a bf16 weight and 16 bits exactly, from 8 bits or none right on average."""

import pytest
import torch
from torch import Tensor

from megatron_step.ops.main_weight import (
    add_correction,
    add_remainder,
    join_main,
    round_stochastically,
    split_correction,
    split_main_,
    split_remainder,
)

UPPER_HALVES = {
    "zero": 0x0000,
    "denormal": 0x0013,
    "largest denormal": 0x007F,
    "smallest normal": 0x0080,
    "even": 0x3F80,
    "odd": 0x3F81,
    "carries into the exponent": 0x3FFF,
    "negative, odd": 0xBE55,
    "negative, carries into the exponent": 0xC0FF,
    "negative zero": 0x8000,
    "largest finite": 0x7F7F,
    "negative, largest finite": 0xFF7F,
}


def all_lower_halves(upper: int) -> Tensor:
    """The 2^16 fp32 numbers with these upper 16 bits."""
    signed = upper - 2**16 if upper >= 2**15 else upper
    return ((signed << 16) + torch.arange(2**16)).to(torch.int32).view(torch.float32)


def bits_of(values: Tensor) -> Tensor:
    return values.view(torch.int32).long()


@pytest.mark.parametrize("upper", UPPER_HALVES.values(), ids=UPPER_HALVES)
def test_exact_states_keep_every_bit(upper):
    main = all_lower_halves(upper)
    second = torch.linspace(0, 1, 2**16)
    weight, remainder = torch.empty(2**16).bfloat16(), torch.empty(2**16, dtype=torch.int16)
    marked = second.clone()
    split_main_(main, weight, remainder, marked)
    assert torch.equal(weight, main.bfloat16()), "the forward pass sees the weight rounded to nearest"
    assert torch.equal(bits_of(join_main(weight, remainder, marked)), bits_of(main))
    assert torch.equal(bits_of(marked), bits_of(second)), "the second moment is as before, without signs"


@pytest.mark.parametrize("upper", UPPER_HALVES.values(), ids=UPPER_HALVES)
def test_a_remainder_keeps_every_bit_beside_the_nearest_weight(upper):
    main = all_lower_halves(upper)
    weight, remainder = split_remainder(main)
    assert torch.equal(bits_of(add_remainder(weight, remainder)), bits_of(main))
    assert (weight != main.bfloat16()).sum() <= 1, "ties round away from zero"
    assert (bits_of(weight.float()) - bits_of(main)).abs().max() == 2**15


def test_a_correction_is_right_on_average_and_errs_by_less_than_its_last_place():
    main = torch.cat([all_lower_halves(upper)[::61] for upper in (0x3F81, 0x3FFF, 0xBE55, 0x0013)])
    sums = torch.zeros(len(main), dtype=torch.int64)
    for random in range(256):
        weight, correction = split_correction(main, torch.full(main.shape, random))
        lost = bits_of(main) - bits_of(add_correction(weight, correction))
        assert lost.abs().max() < 256
        assert (bits_of(weight.float()) - bits_of(main)).abs().max() <= 2**15 + 256
        sums += lost
    assert not sums.any(), "the 256 equally likely results average to the value"


def test_stochastic_rounding_is_right_on_average_and_gives_a_neighbour():
    for upper in (0x3F80, 0x3FFF, 0xBE55, 0x0013):
        main = all_lower_halves(upper)[::4001]
        draws = torch.arange(2**16).unsqueeze(1).expand(-1, len(main))
        rounded = round_stochastically(main.expand(2**16, -1).contiguous(), draws).float()
        errors = bits_of(rounded) - bits_of(main)
        assert errors.abs().max() < 2**16
        assert not errors.sum(0).any(), "the 2^16 equally likely results average to the value"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan_stay(value):
    main, bits = torch.full((4,), value), torch.full((4,), 255)
    second = torch.full((4,), float("nan"))
    weight, remainder = torch.empty(4).bfloat16(), torch.empty(4, dtype=torch.int16)
    split_main_(main, weight, remainder, second)
    for kept in (
        join_main(weight, remainder, second),
        add_remainder(*split_remainder(main)),
        add_correction(*split_correction(main, bits)),
        round_stochastically(main, bits + 65280).float(),
    ):
        torch.testing.assert_close(kept, main, rtol=0, atol=0, equal_nan=True)

"""8-bit moments: right on average, as near as their codes lie, and the same in every split of a weight."""

import math

import pytest
import torch
from torch import Tensor

from megatron_step.ops.index_hash import element_indices, random_bits
from megatron_step.ops.moment_codes import (
    block_count,
    block_peaks,
    block_scales,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from megatron_step.plan.states import MOMENT_BLOCK

CODECS = {"first": (encode_first, decode_first, 127, 2), "second": (encode_second, decode_second, 255, 4)}


def moments(which: str, rows: int = 3, columns: int = 200) -> Tensor:
    """Values over many orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp()
    return values if which == "first" else values.square()


def bits16(shape: torch.Size, seed: int = 3) -> Tensor:
    return random_bits(seed, element_indices(*shape, 0, shape[1])) & 0xFFFF


@pytest.mark.parametrize("which", CODECS)
def test_the_two_neighbours_average_to_the_value(which):
    encode, decode, levels, power = CODECS[which]
    values = moments(which, 1, 64)
    scales = block_scales(block_peaks(values, 0))
    draws = torch.arange(0, 2**16, 16)  # evenly spread
    many = values.expand(len(draws), -1).contiguous()
    codes = encode(many, scales.expand(len(draws), 1), draws.unsqueeze(1).expand_as(many), 0)
    assert (codes.int().amax(0) - codes.int().amin(0)).max() <= 1, "a value has two neighbours"
    decoded = decode(codes, scales.expand(len(draws), 1), 0).double()
    roots = (values.abs().double() / scales.double()) ** (1 / power) * levels
    steps = ((roots.floor() + 1) ** power - roots.floor() ** power) / levels**power * scales.double()
    # 4096 draws hit a probability to 1/4096 of a step, and the arithmetic is fp32.
    exact = roots >= (1 if which == "second" else 0)  # a second moment's code is at least 1
    assert ((decoded.mean(0) - values.double()).abs() / steps)[exact].max() < 1 / 2000
    assert ((decoded - values.double()).abs() <= steps * 1.001).all(), "one step of the codes bounds the error"


@pytest.mark.parametrize("which", CODECS)
def test_codes_come_back_from_their_values(which):
    """Decoding and encoding again changes nothing: states survive any number of loads."""
    encode, decode, levels, _ = CODECS[which]
    codes = torch.arange(-levels if which == "first" else 0, levels + 1)
    for scale in (1.0, 3.25e-5, 2.0**-90, 7e30):
        scales = torch.full((len(codes), 1), scale).bfloat16()
        stored = codes.unsqueeze(1).to(torch.int8 if which == "first" else torch.uint8)
        # fp32 puts a value within 3e-5 of a step of its code: only the most extreme draws could choose another.
        for draw in (3, 2**15, 2**16 - 4):
            assert torch.equal(encode(decode(stored, scales, 0), scales, torch.full((len(codes), 1), draw), 0), stored)


def test_a_scale_is_the_peak_rounded_up():
    peaks = torch.tensor([[0.0, 1.0, 1.0001, 3e38, 3.4e38, 1e-38, 1.2e-38, 1e-45, math.inf, math.nan]])
    scales = block_scales(peaks).float()
    assert scales[0, :3].tolist() == [0.0, 1.0, 1.0078125]
    largest = torch.finfo(torch.bfloat16).max
    assert scales[0, 4] == largest
    assert scales[0, 5:8].tolist() == [0.0, float(torch.tensor(1.2e-38).bfloat16()), 0.0]
    assert scales[0, 8] == math.inf
    assert scales[0, 9].isnan()
    normal = moments("second", 9, 999).flatten().unsqueeze(0)
    ratio = block_scales(normal).float() / normal
    assert ratio.min() >= 1
    assert ratio.max() < 1 + 2**-7


def test_zeros_stay_zero_and_no_other_second_moment_becomes_zero():
    values = torch.tensor([[0.0, 1.0, 1e-12, 1e-30, 1e-45, 0.0]])
    scales = block_scales(block_peaks(values, 0))
    for draw in (0, 2**16 - 1):
        codes = encode_second(values, scales, torch.full((1, 6), draw), 0)
        assert codes.tolist() == [[0, 255, 1, 1, 1, 0]]
    empty = torch.zeros(1, 6)
    assert block_scales(block_peaks(empty, 0)).tolist() == [[0.0]]
    for encode, decode, _, _ in CODECS.values():
        codes = encode(empty, torch.zeros(1, 1).bfloat16(), torch.full((1, 6), 2**16 - 1), 0)
        assert not codes.any()
        assert not decode(codes, torch.zeros(1, 1).bfloat16(), 0).any()


@pytest.mark.parametrize("which", CODECS)
@pytest.mark.parametrize("peak", [1e-45, 1e-38, 1.3e-38, 1e-30, 3e38])
def test_blocks_of_any_magnitude_come_back(which, peak):
    encode, decode, _, _ = CODECS[which]
    values = torch.linspace(0, 1, 50).unsqueeze(0) * peak
    scales = block_scales(block_peaks(values, 0))
    decoded = decode(encode(values, scales, bits16(values.shape), 0), scales, 0)
    assert ((decoded - values).abs() <= (0.04 * scales.float() if peak >= 1.2e-38 else 1.2e-38)).all()


@pytest.mark.parametrize("which", CODECS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_value_that_is_not_finite_reaches_its_block_and_no_other(which, value):
    encode, decode, _, _ = CODECS[which]
    values = moments(which, 2, 130)
    values[0, 70] = value
    scales = block_scales(block_peaks(values, 0))
    decoded = decode(encode(values, scales, bits16(values.shape), 0), scales, 0)
    assert not decoded[0, 70].isfinite()
    finite = scales.isfinite().repeat_interleave(MOMENT_BLOCK, 1)[:, :130]
    assert finite.sum() == 2 * 130 - 64
    assert decoded[finite].isfinite().all()


@pytest.mark.parametrize("which", CODECS)
def test_cut_blocks_have_the_whole_blocks_codes(which):
    encode, decode, _, _ = CODECS[which]
    values = moments(which)
    bits, scales = bits16(values.shape), block_scales(block_peaks(values, 0))
    codes = encode(values, scales, bits, 0)
    for start, stop in [(0, 200), (0, 64), (64, 200), (10, 11), (60, 130), (100, 200), (127, 129)]:
        blocks = slice(start // MOMENT_BLOCK, start // MOMENT_BLOCK + block_count(stop - start, start))
        own = encode(values[:, start:stop].contiguous(), scales[:, blocks], bits[:, start:stop], start)
        assert torch.equal(own, codes[:, start:stop])
        assert torch.equal(decode(own, scales[:, blocks], start), decode(codes, scales, 0)[:, start:stop])
        assert (block_peaks(values[:, start:stop], start) <= block_peaks(values, 0)[:, blocks]).all()

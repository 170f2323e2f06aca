"""Momentum and update of a rectangle: by the formula in fp64, and in every split of a weight the same."""

import pytest
import torch
from torch import Tensor

from megatron_step.ops.compact_adamw import Rectangle
from megatron_step.ops.moment_codes import block_peaks, block_scales, decode_first, encode_first
from megatron_step.ops.muon import MuonStep, advance_momentum_, apply_update_, momentum_peaks, update_scale
from megatron_step.ops.newton_schulz import orthogonalize

STEP = MuonStep(lr=0.01, momentum=0.9, weight_decay=0.1, step=3, gradient_factor=0.5)
ROWS, COLUMNS = 6, 200
WHOLE = Rectangle(0, 0, COLUMNS)


def _random(seed: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def _codes() -> tuple[Tensor, Tensor]:
    momentum = _random(2)
    scales = block_scales(block_peaks(momentum, 0))
    half = torch.full(momentum.shape, 0x8000)
    return encode_first(momentum, scales, half, 0), scales


def test_the_step_is_the_formula() -> None:
    gradient, momentum, weight, orthogonal = (_random(seed) for seed in range(4))
    g, old, main = gradient.double() * 0.5, momentum.double(), weight.double()
    ahead = advance_momentum_(momentum, None, gradient, WHOLE, STEP, 7)
    fresh = 0.9 * old + 0.1 * g
    assert torch.allclose(momentum.double(), fresh, atol=1e-6)
    assert torch.allclose(ahead.double(), 0.1 * g + 0.9 * fresh, atol=1e-6)
    apply_update_(weight, None, orthogonal, 3.0, WHOLE, STEP, 7)
    assert torch.allclose(weight.double(), main * (1 - 0.001) - 0.01 * 3 * orthogonal.double(), atol=1e-6)


@pytest.mark.parametrize("rest", [torch.int16, torch.int8, None])
def test_bf16_weights_keep_what_their_main_weights_have_room_for(rest: torch.dtype | None) -> None:
    weight, orthogonal = _random(1).bfloat16(), _random(2)
    low = None if rest is None else torch.zeros(weight.shape, dtype=rest)
    main = weight.float()
    for step in range(100):
        one = MuonStep(lr=1e-5, momentum=0.9, weight_decay=0.0, step=step + 1)
        apply_update_(weight, low, orthogonal, 1.0, WHOLE, one, 7)
        main -= 1e-5 * orthogonal
    moved = weight.float() - main
    # Updates are below half the distance of two bf16 numbers: rounded to nearest, nothing would move.
    tolerance = {torch.int16: 2.0**-8, torch.int8: 2.0**-8, None: 0.1}[rest]
    assert (moved.abs() <= tolerance * main.abs() + 1e-2 * (rest is None)).all()
    assert abs(float(moved.mean())) < 1e-4


def test_a_weight_in_rectangles_is_updated_bit_for_bit_as_the_whole() -> None:
    """Rectangles that cut rows and blocks; ranks that share a block agree on its peak."""
    gradient, (whole, scales) = _random(1), _codes()
    parts = [(slice(0, 2), slice(0, 200)), (slice(2, 6), slice(0, 100)), (slice(2, 6), slice(100, 200))]
    codes, found = whole.clone(), torch.empty(ROWS, COLUMNS)
    expected = advance_momentum_(whole, scales, gradient, WHOLE, STEP, 7)
    old, _ = _codes()
    blocks = [slice(0, 4), slice(0, 2), slice(1, 4)]
    old_scales = _codes()[1]
    rectangles = [Rectangle(rows.start, columns.start, COLUMNS) for rows, columns in parts]
    pieces = [(old[part].contiguous(), old_scales[part[0], block].contiguous()) for part, block in zip(parts, blocks)]
    peaks = torch.zeros(1, ROWS, 4)
    for part, block, rectangle, piece in zip(parts, blocks, rectangles, pieces):
        own = momentum_peaks(*piece, gradient[part], rectangle, STEP)
        peaks[:, part[0], block] = torch.maximum(peaks[:, part[0], block], own)
    for part, block, rectangle, piece in zip(parts, blocks, rectangles, pieces):
        found[part] = advance_momentum_(*piece, gradient[part], rectangle, STEP, 7, peaks[:, part[0], block])
        codes[part] = piece[0]
    assert torch.equal(found, expected)
    assert torch.equal(codes, whole)


def test_a_bf16_momentum_is_right_on_average() -> None:
    gradient = torch.full((64, 64), 1 + 2.0**-10)  # an eighth of the way between two bf16 numbers
    whole = Rectangle(0, 0, 64)
    momentum = gradient.bfloat16()
    ahead = advance_momentum_(momentum, None, gradient, whole, MuonStep(0.01, 0.0, 0.0, 1), 7)
    assert torch.equal(ahead, gradient)
    assert set(momentum.unique().tolist()) == {1.0, 1 + 2.0**-7}
    assert float(momentum.float().mean()) == pytest.approx(1 + 2.0**-10, abs=2.0**-13)


def test_codes_are_near_the_momentum() -> None:
    gradient, (codes, scales) = _random(1), _codes()
    old = decode_first(codes, scales, 0)
    advance_momentum_(codes, scales, gradient, WHOLE, STEP, 7)
    fresh = old + (0.5 * gradient - old) * 0.1
    error = (decode_first(codes, scales, 0) - fresh).abs().amax(1)
    assert (error <= fresh.abs().amax(1) * 2 / 127 * 1.02).all()


@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (128, 48)])
def test_an_update_has_the_size_of_adamws(shape: tuple[int, int]) -> None:
    orthogonal = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    assert 0.15 < float((update_scale(*shape) * orthogonal).square().mean().sqrt()) < 0.22

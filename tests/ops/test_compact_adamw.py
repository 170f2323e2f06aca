"""AdamW over compact states: against float64, in every split of a weight, and on both paths bit for bit."""

import itertools
from dataclasses import replace

import pytest
import torch
from ops.conftest import taking
from torch import Tensor

from megatron_step.engine.compat.operations import fused_adamw_
from megatron_step.ops import AdamWStep, CompactStates, Rectangle, compact_adamw_, compact_adamw_peaks, main_weight
from megatron_step.ops.moment_codes import block_count, decode_first, decode_second

STEP = AdamWStep(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3, gradient_factor=0.75)
FORMATS = list(itertools.product((torch.int16, torch.int8, None), (torch.float32, torch.int8)))
"""Types of the remainder, and of the first moment."""
formats = pytest.mark.parametrize(("remainder", "moment"), FORMATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def new_states(rows: int, columns: int, remainder: torch.dtype | None, moment: torch.dtype) -> CompactStates:
    """States at the beginning: random weights, moments zero."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()
    kept = None if remainder is None else torch.zeros(rows, columns, dtype=remainder)
    if moment == torch.float32:
        return CompactStates(weight, kept, torch.zeros(rows, columns), torch.zeros(rows, columns))
    codes = [torch.zeros(rows, columns, dtype=dtype) for dtype in (torch.int8, torch.uint8)]
    scales = [torch.zeros(rows, block_count(columns, 0)).bfloat16() for _ in range(2)]
    return CompactStates(weight, kept, *codes, *scales)


def gradient_of(rows: int, columns: int, step: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gradients whose magnitude varies over the weight."""
    generator = torch.Generator().manual_seed(step)
    magnitude = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul(2).exp() * 1e-3
    return (torch.randn(rows, columns, generator=generator) * magnitude).to(dtype)


def tensors_of(states: CompactStates) -> list[Tensor]:
    return [tensor for tensor in vars(states).values() if tensor is not None]


def clone(states: CompactStates) -> CompactStates:
    return CompactStates(**{name: None if x is None else x.clone() for name, x in vars(states).items()})


def equal(left: CompactStates, right: CompactStates) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(left), tensors_of(right), strict=True))


def decoded(states: CompactStates) -> list[Tensor]:
    """Main weight, first and second moment, of a whole weight."""
    if states.remainder is None:
        main = states.weight.float()
    elif states.remainder.dtype == torch.int16:
        main = main_weight.add_remainder(states.weight, states.remainder)
    else:
        main = main_weight.add_correction(states.weight, states.remainder)
    if states.first_scale is None or states.second_scale is None:
        return [main, states.first, states.second]
    return [
        main,
        decode_first(states.first, states.first_scale, 0),
        decode_second(states.second, states.second_scale, 0),
    ]


def trained(states: CompactStates, steps: int, dtype: torch.dtype = torch.bfloat16, seed: int = 7) -> CompactStates:
    """The states after some steps."""
    rows, columns = states.weight.shape
    for step in range(1, steps + 1):
        gradient = gradient_of(rows, columns, step, dtype)
        compact_adamw_(states, gradient, Rectangle(0, 0, columns), replace(STEP, step=step), seed)
    return states


def float64_update(main: Tensor, first: Tensor, second: Tensor, gradient: Tensor) -> list[Tensor]:
    """One step of AdamW by its formula."""
    w, m, v, g = (x.double() for x in (main, first, second, gradient))
    g = g * STEP.gradient_factor
    m = STEP.beta1 * m + (1 - STEP.beta1) * g
    v = STEP.beta2 * v + (1 - STEP.beta2) * g * g
    m_hat, v_hat = m / (1 - STEP.beta1**STEP.step), v / (1 - STEP.beta2**STEP.step)
    return [w * (1 - STEP.lr * STEP.weight_decay) - STEP.lr * m_hat / (v_hat.sqrt() + STEP.eps), m, v]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp32_moments_and_a_remainder_err_at_most_twice_as_much_as_torchs_fused_adamw(path, dtype):
    states = trained(new_states(37, 150, torch.int16, torch.float32), 2, dtype)
    gradient = gradient_of(37, 150, 3, dtype)
    before = [x.clone() for x in decoded(states)]
    exact = float64_update(*before, gradient)
    w, m, v = before
    clipped = gradient.float() * STEP.gradient_factor
    fused_adamw_(
        [w], [clipped], [m], [v], [], [torch.tensor(3.0)], lr=STEP.lr, beta1=STEP.beta1, beta2=STEP.beta2,
        weight_decay=STEP.weight_decay, eps=STEP.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    compact_adamw_(states, gradient, Rectangle(0, 0, 150), STEP, 7)
    for ours, fused, wanted in zip(decoded(states), (w, m, v), exact):
        assert (ours - wanted).norm() <= 2 * (fused - wanted).norm()
        assert (ours - wanted).abs().max() <= 2 * (fused - wanted).abs().max()


@formats
def test_compact_states_follow_float64_within_one_step_of_their_codes_and_on_average(path, remainder, moment):
    before = trained(new_states(8, 128, remainder, moment), 2)
    gradient = gradient_of(8, 128, 3)
    exact = float64_update(*decoded(before), gradient)
    seeds = 100
    sums = [torch.zeros_like(x) for x in exact]
    for seed in range(seeds):
        states = clone(before)
        compact_adamw_(states, gradient, Rectangle(0, 0, 128), STEP, seed)
        for sum_, x in zip(sums, decoded(states)):
            sum_ += x
    bits = {torch.int16: 2.0**-24, torch.int8: 2.0**-16, None: 2.0**-8}[remainder]
    steps = [exact[0].abs() * bits, torch.zeros_like(exact[1]), torch.zeros_like(exact[2])]
    if moment == torch.int8:
        for index, levels, power in ((1, 127, 2), (2, 255, 4)):
            scale = exact[index].abs().unflatten(1, (-1, 64)).amax(-1).repeat_interleave(64, 1) * (1 + 2**-7)
            root = (exact[index].abs() / scale) ** (1 / power)
            steps[index] = scale * ((root + 1 / levels) ** power - root**power)
    for sum_, wanted, start, step in zip(sums, exact, decoded(before), steps):
        # A mean of 100 fair choices between two values strays by more than 0.25 of their distance once in 10^6.
        rounding = 2e-7 * (wanted.abs() + start.abs())
        assert ((sum_ / seeds - wanted).abs() <= 0.25 * step + rounding).float().mean() > 0.999


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_and_plain_torch_give_the_same_bits(kernel, remainder, moment, dtype):
    states = [new_states(50, 333, remainder, moment) for _ in range(2)]
    for step in range(1, 6):
        gradient, hyper = gradient_of(50, 333, step, dtype), replace(STEP, step=step)
        place = Rectangle(2**32 * 3 // 333 - 25, 0, 333)  # the indices pass 3 * 2^32
        peaks = []
        for own, path in zip(states, ("kernel", "torch")):
            with taking(path):
                peaks.append(compact_adamw_peaks(own, gradient, place, hyper))
                compact_adamw_(own, gradient, place, hyper, 7)
        assert torch.equal(*peaks)
        assert equal(*states)


@formats
def test_the_result_is_the_same_on_any_number_of_threads(kernel, set_threads, remainder, moment):
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(trained(new_states(300, 333, remainder, moment), 2))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def slices_of(states: CompactStates, rows: slice, columns: slice) -> CompactStates:
    """A copy of a rectangle of the states of a whole weight."""
    blocks = slice(columns.start // 64, (columns.stop - 1) // 64 + 1)
    return CompactStates(
        **{
            name: None if x is None else x[rows, blocks if name.endswith("scale") else columns].contiguous()
            for name, x in vars(states).items()
        }
    )


def flat(start: int, stop: int, columns: int) -> list[tuple[slice, slice]]:
    """The rectangles of a slice of a flattened weight: the end of a row, whole rows, the beginning of a row."""
    pieces = []
    while start < stop:
        row, column = divmod(start, columns)
        rows = max(1, (stop - start) // columns) if column == 0 else 1
        width = min(columns - column, stop - start)
        pieces.append((slice(row, row + rows), slice(column, column + width)))
        start += rows * width
    return pieces


SPLITS = {
    "rows": [(slice(0, 4), slice(0, 200)), (slice(4, 9), slice(0, 200))],
    "columns at a block": [(slice(0, 9), slice(0, 128)), (slice(0, 9), slice(128, 200))],
    "columns within blocks": [(slice(0, 9), slice(*ends)) for ends in ((0, 10), (10, 100), (100, 101), (101, 200))],
    "flat slices": [piece for ends in ((0, 450), (450, 1111), (1111, 1800)) for piece in flat(*ends, 200)],
}


@formats
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_weight_in_rectangles_is_updated_bit_for_bit_as_the_whole(path, split, remainder, moment):
    whole = trained(new_states(9, 200, remainder, moment), 2)
    gradient = gradient_of(9, 200, 3)
    parts = [slices_of(whole, *piece) for piece in split]
    places = [Rectangle(rows.start, columns.start, 200) for rows, columns in split]
    gradients = [gradient[piece].contiguous() for piece in split]
    # What ranks would do: the largest peaks of the rectangles that share a block.
    largest = torch.zeros(2, 9, block_count(200, 0))
    shared = [(slice(None), rows, slice(columns.start // 64, (columns.stop - 1) // 64 + 1)) for rows, columns in split]
    for part, place, own, piece in zip(parts, places, gradients, shared):
        largest[piece] = largest[piece].maximum(compact_adamw_peaks(part, own, place, STEP))
    for part, place, own, piece in zip(parts, places, gradients, shared):
        compact_adamw_(part, own, place, STEP, 7, largest[piece].contiguous())
    compact_adamw_(whole, gradient, Rectangle(0, 0, 200), STEP, 7)
    for part, piece in zip(parts, split):
        assert equal(part, slices_of(whole, *piece))


def test_random_bits_depend_on_seed_step_and_index(path):
    """Neither two steps, nor two seeds, nor two elements round in the same direction."""
    outcomes = []
    for seed, step, first_row in ((1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 1, 64), (1, 1, 2**36)):
        states = CompactStates(torch.ones(64, 64).bfloat16(), None, torch.zeros(64, 64), torch.zeros(64, 64))
        hyper = AdamWStep(lr=2.0**-8, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.5, step=step)
        compact_adamw_(states, torch.zeros(64, 64), Rectangle(first_row, 0, 64), hyper, seed)
        outcomes.append((states.weight == 1).float())
        assert abs(outcomes[-1].mean() - 0.5) < 0.05
    for left, right in itertools.combinations(outcomes, 2):
        assert abs((left == right).float().mean() - 0.5) < 0.05


@formats
def test_peaks_write_nothing(path, remainder, moment):
    states = trained(new_states(3, 100, remainder, moment), 1)
    before = clone(states)
    peaks = compact_adamw_peaks(states, gradient_of(3, 100, 2), Rectangle(0, 0, 100), STEP)
    assert peaks.shape == (2, 3, 2)
    assert equal(states, before)


@formats
def test_a_gradient_that_is_not_finite_is_seen_in_its_weight_and_in_no_other_block(path, remainder, moment):
    for value in (float("nan"), float("inf")):
        states = trained(new_states(2, 130, remainder, moment), 1)
        gradient = gradient_of(2, 130, 2)
        gradient[0, 70] = value
        compact_adamw_(states, gradient, Rectangle(0, 0, 130), STEP, 7)
        main, first, second = decoded(states)
        assert main[0, 70].isnan()
        assert not first[0, 70].isfinite()
        assert not second[0, 70].isfinite()
        assert main.isnan().sum() == 1
        assert first[:, :64].isfinite().all()
        assert first[1].isfinite().all()


@formats
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 63), (3, 65)])
def test_any_shape(path, shape, remainder, moment):
    states = new_states(*shape, remainder, moment)
    before = clone(states)
    compact_adamw_(states, gradient_of(*shape, 1), Rectangle(0, 0, max(shape[1], 1)), replace(STEP, step=1), 7)
    assert equal(states, before) == (states.weight.numel() == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 70)}, "weight must be a bfloat16 matrix, got torch.float32"),
        ({"remainder": torch.zeros(2, 70)}, "remainder must be .*int16.*int8.*got torch.float32"),
        ({"remainder": torch.zeros(2, 71).short()}, r"remainder must be .*\(2, 70\), got torch.int16 \[2, 71\]"),
        ({"first": torch.zeros(2, 70)}, "first must be .*int8"),
        ({"second": torch.zeros(2, 70).char()}, "second must be .*uint8"),
        ({"first_scale": None}, "both moments have scales, or neither"),
        ({"first_scale": torch.ones(2, 1).bfloat16()}, r"first_scale must be bfloat16 \[2, 2\], got .*\[2, 1\]"),
        ({"second_scale": torch.ones(2, 2)}, "second_scale must be bfloat16"),
        ({"second": torch.zeros(70, 2).byte().t()}, "contiguous"),
    ],
)
def test_states_that_do_not_fit_are_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        states = replace(new_states(2, 70, torch.int16, torch.int8), **change)
        compact_adamw_(states, torch.zeros(2, 70), Rectangle(0, 0, 70), STEP, 1)


@pytest.mark.parametrize(
    ("gradient", "place", "peaks", "message"),
    [
        (torch.zeros(2, 69), (0, 0, 70), None, r"gradient must be .* \[2, 70\], got torch.float32 \[2, 69\]"),
        (torch.zeros(2, 70).half(), (0, 0, 70), None, "gradient must be float32 or bfloat16"),
        (torch.zeros(2, 70), (0, 1, 70), None, "no 70 columns from its first column on"),
        (torch.zeros(2, 70), (0, 70, 70), None, "must begin within the whole weight"),
        (torch.zeros(2, 70), (-1, 0, 70), None, "must begin within the whole weight"),
        (torch.zeros(2, 70), (0, 0, 70), torch.zeros(2, 2, 1), r"peaks must be float32 \[2, 2, 2\]"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(gradient, place, peaks, message):
    states = new_states(2, 70, torch.int16, torch.int8)
    with pytest.raises(ValueError, match=message):
        compact_adamw_(states, gradient, Rectangle(*place), STEP, 1, peaks)

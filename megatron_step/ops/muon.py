"""Muon's momentum and update of a rectangle of a weight, element by element.

    g = gradient_factor * gradient
    m = m + (1 - momentum) (g - m)
    u = g + momentum (m - g)                               Nesterov's step, which is orthogonalised over a whole matrix
    main = (1 - lr decay) main - lr * scale * O            with O [n, m] orthogonal and scale = 0.2 sqrt(max(n, m))

O has a root mean square of about 1 / sqrt(max(n, m)). The scale gives updates that of AdamW's, about 0.2 (Moonlight,
arXiv 2502.16982). The update takes the fresh m, before it is encoded. Weights are fp32, or bf16 with what
ops/main_weight.py keeps beside them; m is fp32, bf16 that is rounded stochastically, or int8 codes of
ops/moment_codes.py. Random bits depend on the seed, the step and an element's index in the whole weight, as in
ops/compact_adamw.py.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from megatron_step.ops.compact_adamw import WEIGHT_BITS, Rectangle
from megatron_step.ops.index_hash import element_indices, random_bits, step_seed
from megatron_step.ops.main_weight import read_main, round_stochastically, write_main_
from megatron_step.ops.moment_codes import block_peaks, block_scales, decode_first, encode_first

_RMS = 0.2
"""Root mean square of an AdamW update without the learning rate, about (Moonlight)."""


@dataclass(frozen=True)
class MuonStep:
    """Hyper-parameters of one step; `step` counts from 1."""

    lr: float
    momentum: float
    weight_decay: float
    step: int
    gradient_factor: float = 1.0
    """Factor of the gradient, to clip it."""


def update_scale(rows: int, columns: int) -> float:
    """Return the factor that gives an orthogonal matrix [rows, columns] the root mean square of AdamW's updates."""
    return _RMS * sqrt(max(rows, columns))


def momentum_peaks(
    momentum: Tensor, scales: Tensor | None, gradient: Tensor, rectangle: Rectangle, step: MuonStep
) -> Tensor:
    """Return the peaks of the momentum that the step would encode: fp32 [1, rows, blocks]."""
    fresh, _ = _fresh(momentum, scales, gradient, rectangle, step)
    return block_peaks(fresh, rectangle.first_column).unsqueeze(0)


def advance_momentum_(
    momentum: Tensor,
    scales: Tensor | None,
    gradient: Tensor,
    rectangle: Rectangle,
    step: MuonStep,
    seed: int,
    peaks: Tensor | None = None,
) -> Tensor:
    """Update the momentum of a rectangle in place, and return Nesterov's step u: fp32 [rows, columns].

    `momentum` [rows, columns] is fp32, bf16, or int8 codes with bf16 `scales` [rows, blocks]. `gradient` is fp32 or
    bf16. `seed` is the whole weight's. `peaks` [1, rows, blocks] has the largest peaks over all rectangles that share a
    block, and 0 for blocks that lie in this rectangle alone.
    """
    fresh, ahead = _fresh(momentum, scales, gradient, rectangle, step)
    if momentum.dtype == torch.float32:
        momentum.copy_(fresh)
        return ahead
    bits = random_bits(step_seed(seed, step.step), _indices(momentum, rectangle)) & 0xFFFF
    if scales is None:
        momentum.copy_(round_stochastically(fresh, bits))
        return ahead
    column = rectangle.first_column
    largest = block_peaks(fresh, column)
    if peaks is not None:
        largest = torch.maximum(largest, peaks[0])
    scales.copy_(block_scales(largest))
    momentum.copy_(encode_first(fresh, scales, bits, column))
    return ahead


def apply_update_(
    weight: Tensor,
    rest: Tensor | None,
    orthogonal: Tensor,
    scale: float,
    rectangle: Rectangle,
    step: MuonStep,
    seed: int,
) -> None:
    """Update the weights of a rectangle in place by its part `orthogonal` [rows, columns] of the orthogonal matrix.

    `weight` is fp32, or bf16 with int16 remainders, int8 corrections or nothing beside it in `rest`. `scale` is the
    matrix's `update_scale`.
    """
    main = read_main(weight, rest) * (1 - step.lr * step.weight_decay) - orthogonal.float() * (step.lr * scale)
    bits_seed = step_seed(seed, step.step) + WEIGHT_BITS
    write_main_(main, weight, rest, lambda: random_bits(bits_seed, _indices(weight, rectangle)))


def _fresh(
    momentum: Tensor, scales: Tensor | None, gradient: Tensor, rectangle: Rectangle, step: MuonStep
) -> tuple[Tensor, Tensor]:
    """The momentum after the gradient, and Nesterov's step."""
    stored = momentum.float() if scales is None else decode_first(momentum, scales, rectangle.first_column)
    g = gradient.float() * step.gradient_factor
    fresh = stored + (g - stored) * (1 - step.momentum)
    return fresh, g + (fresh - g) * step.momentum


def _indices(elements: Tensor, rectangle: Rectangle) -> Tensor:
    rows, columns = elements.shape
    return element_indices(rows, columns, rectangle.first_index, rectangle.whole_columns, elements.device)

"""AdamW over compact states: bf16 weights, main weights of 0 to 16 more bits, moments in fp32 or 8 bits.

One step decodes the states, updates them in fp32, and encodes them again:

    g = gradient_factor * gradient
    m = m + (1 - beta1) (g - m),    v = beta2 v + (1 - beta2) g^2
    main = (1 - lr decay) main - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

The update takes the fresh m and v, before they are encoded. ops/main_weight.py and ops/moment_codes.py describe the
encodings. Random bits depend on the seed, the step and an element's index in the whole weight, and nothing else does
either: a weight that is split into rectangles, over ranks or threads, is updated bit for bit as the whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_step.ops.dispatch import use_kernel
from megatron_step.ops.index_hash import element_indices, random_bits, step_seed
from megatron_step.ops.main_weight import read_main, write_main_
from megatron_step.ops.moment_codes import (
    block_count,
    block_peaks,
    block_scales,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    exact_root,
)

WEIGHT_BITS = 1
"""Added to a step's seed for the random bits of main weights; those of moments have the seed itself."""


@dataclass(frozen=True)
class Rectangle:
    """Place of a rectangle of elements in a whole weight; the shape of its tensors gives its rows and columns.

    Raises:
        ValueError: the place is not within the whole weight.
    """

    first_row: int
    """Index of its first row in the whole weight."""
    first_column: int
    """Index of its first column in the whole weight."""
    whole_columns: int
    """Columns of the whole weight."""

    def __post_init__(self) -> None:
        if self.first_row < 0 or not 0 <= self.first_column < self.whole_columns:
            raise ValueError(f"{self}: rows and columns must begin within the whole weight")

    @property
    def first_index(self) -> int:
        """Index of its first element in the flattened whole weight."""
        return self.first_row * self.whole_columns + self.first_column


@dataclass(frozen=True)
class CompactStates:
    """Weight and optimizer states of a rectangle [rows, columns] of one weight, contiguous in memory.

    Raises:
        ValueError: a tensor has another shape or type than its field allows.
    """

    weight: Tensor
    """bf16 weights."""
    remainder: Tensor | None
    """int16 remainders or int8 corrections of the main weights; None if the weight alone is kept."""
    first: Tensor
    """First moments: fp32, or int8 codes."""
    second: Tensor
    """Second moments: fp32, or uint8 codes."""
    first_scale: Tensor | None = None
    """Scales of the first moment's codes: bf16 [rows, blocks], as many blocks as `block_count` says."""
    second_scale: Tensor | None = None
    """Scales of the second moment's codes."""

    def __post_init__(self) -> None:
        if self.weight.dtype != torch.bfloat16 or self.weight.dim() != 2:
            raise ValueError(f"weight must be a bfloat16 matrix, got {_text(self.weight)}")
        scaled = self.first_scale is not None
        if scaled != (self.second_scale is not None):
            raise ValueError("first_scale and second_scale: both moments have scales, or neither has")
        wanted = {
            "remainder": (torch.int16, torch.int8),
            "first": (torch.int8 if scaled else torch.float32,),
            "second": (torch.uint8 if scaled else torch.float32,),
        }
        for name, types in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dtype not in types or tensor.shape != self.weight.shape):
                raise ValueError(f"{name} must be {types} {tuple(self.weight.shape)}, got {_text(tensor)}")
        if not all(tensor is None or tensor.is_contiguous() for tensor in vars(self).values()):
            raise ValueError("states of a rectangle must be contiguous")


@dataclass(frozen=True)
class AdamWStep:
    """Hyper-parameters of one step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    gradient_factor: float = 1.0
    """Factor of the gradient, to clip it."""

    @property
    def decay(self) -> float:
        """What is left of a weight: 1 - lr decay."""
        return 1 - self.lr * self.weight_decay

    @property
    def root_factor(self) -> float:
        """Factor of sqrt(v): 1 / sqrt(1 - beta2^t)."""
        return (1 - self.beta2**self.step) ** -0.5

    @property
    def step_size(self) -> float:
        """Factor of m: lr / (1 - beta1^t)."""
        return self.lr / (1 - self.beta1**self.step)


def compact_adamw_(
    states: CompactStates,
    gradient: Tensor,
    rectangle: Rectangle,
    step: AdamWStep,
    seed: int,
    peaks: Tensor | None = None,
) -> None:
    """Update the states of a rectangle in place.

    `gradient` is bf16 or fp32 [rows, columns]. `seed` is the whole weight's: each weight needs another. `peaks`, from
    `compact_adamw_peaks`, has the largest peaks over all rectangles that share a block of 8-bit moments, and 0 for
    blocks that lie in this rectangle alone; it is needed only if blocks are shared.

    Raises ValueError if shapes or types do not fit.
    """
    _check(states, gradient, rectangle, peaks)
    own_seed = step_seed(seed, step.step)
    if not use_kernel(states.weight, gradient):
        compact_adamw_reference_(states, gradient, rectangle, step, own_seed, peaks)
        return
    torch.ops.megatron_step.compact_adamw_(
        states.weight, gradient.contiguous(), states.remainder, states.first, states.second, states.first_scale,
        states.second_scale, peaks, step.gradient_factor, step.decay, step.beta1, step.beta2, step.root_factor,
        step.eps, step.step_size, own_seed, rectangle.first_index, rectangle.whole_columns, rectangle.first_column,
    )  # fmt: skip


def compact_adamw_peaks(states: CompactStates, gradient: Tensor, rectangle: Rectangle, step: AdamWStep) -> Tensor:
    """Return the peaks of the first and second moments that the step would encode: fp32 [2, rows, blocks].

    Raises ValueError if shapes or types do not fit.
    """
    _check(states, gradient, rectangle, None)
    if not use_kernel(gradient):
        return _peaks(_fresh_moments(states, gradient, rectangle, step), rectangle)
    return torch.ops.megatron_step.compact_adamw_peaks(
        gradient.contiguous(), states.first, states.second, states.first_scale, states.second_scale,
        step.gradient_factor, step.beta1, step.beta2, rectangle.first_column,
    )  # fmt: skip


def compact_adamw_reference_(
    states: CompactStates, gradient: Tensor, rectangle: Rectangle, step: AdamWStep, seed: int, peaks: Tensor | None
) -> None:
    """Update in plain torch; `seed` is that of the step."""
    rows, columns = gradient.shape
    index = element_indices(rows, columns, rectangle.first_index, rectangle.whole_columns, gradient.device)
    first, second = _fresh_moments(states, gradient, rectangle, step)
    ratio = first / (exact_root(second) * step.root_factor + step.eps)
    main = read_main(states.weight, states.remainder) * step.decay - ratio * step.step_size
    write_main_(main, states.weight, states.remainder, lambda: random_bits(seed + WEIGHT_BITS, index))
    if states.first_scale is None or states.second_scale is None:
        states.first.copy_(first)
        states.second.copy_(second)
        return
    largest = _peaks((first, second), rectangle)
    if peaks is not None:
        largest = torch.maximum(largest, peaks)
    states.first_scale.copy_(block_scales(largest[0]))
    states.second_scale.copy_(block_scales(largest[1]))
    bits, column = random_bits(seed, index), rectangle.first_column
    states.first.copy_(encode_first(first, states.first_scale, bits & 0xFFFF, column))
    states.second.copy_(encode_second(second, states.second_scale, bits >> 16, column))


def _fresh_moments(
    states: CompactStates, gradient: Tensor, rectangle: Rectangle, step: AdamWStep
) -> tuple[Tensor, Tensor]:
    first, second = states.first, states.second
    if states.first_scale is not None and states.second_scale is not None:
        first = decode_first(first, states.first_scale, rectangle.first_column)
        second = decode_second(second, states.second_scale, rectangle.first_column)
    g = gradient.float() * step.gradient_factor
    return first + (g - first) * (1 - step.beta1), second * step.beta2 + g * g * (1 - step.beta2)


def _peaks(moments: tuple[Tensor, Tensor], rectangle: Rectangle) -> Tensor:
    return torch.stack([block_peaks(moment, rectangle.first_column) for moment in moments])


def _check(states: CompactStates, gradient: Tensor, rectangle: Rectangle, peaks: Tensor | None) -> None:
    rows, columns = states.weight.shape
    if gradient.shape != states.weight.shape or gradient.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"gradient must be float32 or bfloat16 [{rows}, {columns}], got {_text(gradient)}")
    if rectangle.first_column + columns > rectangle.whole_columns:
        raise ValueError(f"{rectangle} has no {columns} columns from its first column on")
    blocks = block_count(columns, rectangle.first_column)
    for name, scale in (("first_scale", states.first_scale), ("second_scale", states.second_scale)):
        if scale is not None and (scale.shape != (rows, blocks) or scale.dtype != torch.bfloat16):
            raise ValueError(f"{name} must be bfloat16 [{rows}, {blocks}], got {_text(scale)}")
    if peaks is not None and (peaks.shape != (2, rows, blocks) or peaks.dtype != torch.float32):
        raise ValueError(f"peaks must be float32 [2, {rows}, {blocks}], got {_text(peaks)}")


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"

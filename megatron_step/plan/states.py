"""States of a weight: which there are, how their numbers are kept, and what that takes. The only owner of these facts.

                      weight   gradient   main weight   moments       frozen linear
    fp32              4        4          -             4 + 4         4
    bf16              2        4          4             4 + 4         2                Megatron-LM
    paper             2        2          4             4 + 4         2                STEP (Yano et al., 2025)
    adam8bit          2        4          4             1 + 1, block  2                Dettmers et al., 2022
    int8_base         2        4          4             4 + 4         1, row           LLM.int8, Dettmers et al., 2022
    adam8bit_int8_base                                  both

Training has the first two; the others are for plans alone (`planner.recipe`).

block: a moment has an fp32 scale for each block of 256 elements, as bitsandbytes has it (2048 in the paper "8-bit
Optimizers via Block-wise Quantization"), and stays in fp32 in tensors of fewer than 4096 elements.
row: a frozen linear's matrix has an fp32 scale for each row, and its product needs it in bf16 for as long as it lasts
("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"); embeddings, output layer, norms and biases stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_step.config.run import RunConfig
from megatron_step.plan.names import layer_of
from megatron_step.plan.old_layers import Treatment

MAIN_WEIGHT = "param"
"""Name of the fp32 main weight among a weight's optimizer states."""
MOMENTS = FIRST_MOMENT, SECOND_MOMENT = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments among them."""
MOMENT_BLOCK = 64
"""Columns of a row of the whole weight that share a moment's scale."""


@dataclass(frozen=True)
class Parameter:
    """A weight, or one rank's part of it."""

    key: str
    """Its name in checkpoints, of the whole weight."""
    shape: tuple[int, ...]
    """Its lengths on this rank."""
    treatment: Treatment
    """What the stage does with it."""

    @property
    def numel(self) -> int:
        """Its elements on this rank."""
        return prod(self.shape)


@dataclass(frozen=True)
class Format:
    """How the numbers of one state are kept."""

    element_bytes: int
    """Bytes of an element."""
    scale_block: int | None = None
    """Elements of a weight that share an fp32 scale; None for no scales."""
    smallest: int = 0
    """Weights of fewer elements keep the state in fp32."""

    def bytes(self, numel: int) -> int:
        """Bytes of the state of a weight of `numel` elements."""
        if numel < self.smallest:
            return FP32.bytes(numel)
        scales = -(-numel // self.scale_block) if self.scale_block else 0
        return self.element_bytes * numel + FP32.element_bytes * scales


FP32, BF16, INT8 = Format(4), Format(2), Format(1)
SAVED_STATE = FP32
"""Format of optimizer states in checkpoints, whatever the recipe of the run."""


@dataclass(frozen=True)
class Recipe:
    """The states of a weight."""

    weight: Format
    """The weight."""
    gradient: Format
    """Its gradient, if it is trained."""
    main: Format | None
    """Its copy for the optimizer, if it is trained; None where the weight itself is as wide."""
    moments: Format = FP32
    """Each of Adam's two moments, if it is trained."""
    frozen_matrix: Format | None = None
    """The matrix of a frozen linear, with a scale for each row; None for the format of weights."""

    def state_format(self, name: str) -> Format:
        """Return the format of the optimizer state that checkpoints call `name`."""
        if name == MAIN_WEIGHT:
            assert self.main is not None  # it is among `optimizer_states` only then
            return self.main
        return self.moments

    @property
    def optimizer_states(self) -> tuple[str, ...]:
        """Names of the optimizer states of a trained weight, as checkpoints have them."""
        return MOMENTS if self.main is None else (*MOMENTS, MAIN_WEIGHT)

    def optimizer_bytes(self, numel: int) -> int:
        """Main weight and moments of `numel` elements of one trained weight."""
        main = self.main.bytes(numel) if self.main else 0
        return main + len(MOMENTS) * self.moments.bytes(numel)

    def trained_bytes(self, numel: int) -> int:
        """Weight and gradient of `numel` elements of trained weights."""
        return self.weight.bytes(numel) + self.gradient.bytes(numel)

    def frozen_bytes(self, parameter: Parameter) -> int:
        """A frozen weight."""
        if self.frozen_matrix and layer_of(parameter.key) >= 0 and len(parameter.shape) == 2:
            return replace(self.frozen_matrix, scale_block=parameter.shape[1]).bytes(parameter.numel)
        return self.weight.bytes(parameter.numel)

    def state_bytes(self, parameters: Sequence[Parameter]) -> int:
        """Model states of `parameters` on one data-parallel rank, without padding."""
        return sum(
            self.trained_bytes(parameter.numel) + self.optimizer_bytes(parameter.numel)
            if parameter.treatment.trained
            else self.frozen_bytes(parameter)
            for parameter in parameters
        )

    def saved_bytes(self, numel: int, trained: int, owners: int) -> int:
        """Bytes that one rank saves: `numel` elements of weights, and its share of the optimizer states of `trained`
        ones, which `owners` data-parallel ranks divide."""
        states = SAVED_STATE.bytes(len(self.optimizer_states) * trained)
        return self.weight.bytes(numel) + -(-states // owners)


def copied_in_growth(layer: int, largest: int) -> int:
    """The most bytes that growth needs beside the model: for a layer of `layer` elements, or to read a
    checkpoint whose largest tensor has `largest` elements.

    A layer's weights are read in bf16, and summed in fp32 for means and merged adapters. Optimizer states, and weights
    outside the layers, are read into their place; an fp32 tensor that is read is there beside the one before it.
    """
    return max(BF16.bytes(layer) + FP32.bytes(layer), 2 * FP32.bytes(largest))


_BF16 = Recipe(weight=BF16, gradient=FP32, main=FP32)
_ADAM8BIT = replace(_BF16, moments=replace(INT8, scale_block=256, smallest=4096))

RECIPES = {
    "fp32": Recipe(weight=FP32, gradient=FP32, main=None),
    "bf16": _BF16,
    "paper": replace(_BF16, gradient=BF16),
    "adam8bit": _ADAM8BIT,
    "int8_base": replace(_BF16, frozen_matrix=INT8),
    "adam8bit_int8_base": replace(_ADAM8BIT, frozen_matrix=INT8),
}
"""What `training.precision` and `planner.recipe` stand for. Training keeps and reduces gradients in fp32."""


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe that is counted by: `planner.recipe`, or the one of training."""
    return RECIPES[config.planner.recipe or config.training.precision]

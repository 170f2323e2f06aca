"""States of a weight: which there are, how their numbers are kept, and what that takes. The only owner of these facts.

                      weight   gradient   main weight   moments       frozen linear
    fp32              4        4          -             4 + 4         4
    full              2        4          4             4 + 4         2                Megatron-LM
    exact             2        2 or 4     2             4 + 4         2
    compact           2        2 or 4     2 or 1        1 + 1, block  2                FlashAdamW, arXiv 2602.23349
    smallest          2        2 or 4     -             1 + 1, block  2
    paper             2        2          4             4 + 4         2                STEP (Yano et al., 2025)
    adam8bit          2        4          4             1 + 1, 256    2                Dettmers et al., 2022
    int8_base         2        4          4             4 + 4         1, row           LLM.int8, Dettmers et al., 2022
    adam8bit_int8_base                                  both

Training has the first five (`training.precision`, `optimizer.states`); the others are for plans alone
(`planner.recipe`).

main weight: 2 or 1 bytes are what the bf16 weight lacks: 16 bits restore the fp32 main weight, 8 bits 24 bits of it.
block: a moment of a matrix has a bf16 scale for each block of 64 columns of a row. Blocks lie on the grid of the whole
weight, so that they do not depend on the layout. Vectors (norms, biases) keep fp32 moments.
256: an fp32 scale for each 256 elements, as bitsandbytes has it (2048 in the paper "8-bit Optimizers via Block-wise
Quantization"), and fp32 in tensors of fewer than 4096 elements.
Muon (`optimizer.rule`) keeps one moment of a layer's matrix, its momentum: in the first moment's format, or in bf16.
row: a frozen linear's matrix has an fp32 scale for each row, and its product needs it in bf16 for as long as it lasts
("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"); embeddings, output layer, norms and biases stay.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_step.config.optimization import Rule
from megatron_step.config.run import RunConfig
from megatron_step.plan.matrices import rule_of
from megatron_step.plan.names import layer_of
from megatron_step.plan.old_layers import Treatment

MAIN_WEIGHT, REMAINDER, CORRECTION = "param", "remainder", "correction"
"""Names of the fp32 main weight among a weight's optimizer states, and of the 16 or 8 bits that the weight lacks."""
MOMENTS = FIRST_MOMENT, SECOND_MOMENT = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments among them; Muon's momentum has the first name."""
SCALE_SUFFIX = "_scale"
"""Ends the name of a moment's scales."""
MOMENT_BLOCK = 64
"""Columns of a row of the whole weight that share a moment's scale."""
WIDENED_ELEMENTS = 2**20
"""Most elements of a bf16 weight that a product has in fp32 at a time, 4 MiB; always at least a row of the weight."""


@dataclass(frozen=True)
class Parameter:
    """A weight, or one rank's part of it."""

    key: str
    """Name of the whole weight in checkpoints."""
    shape: tuple[int, ...]
    """Lengths of the rank's part of the weight."""
    treatment: Treatment
    """How the stage treats the weight."""

    @property
    def numel(self) -> int:
        """Elements of the rank's part of the weight."""
        return prod(self.shape)


@dataclass(frozen=True)
class Format:
    """Number format of one state."""

    name: str
    """Name of the format, by which engine/formats.py finds the type of torch."""
    element_bytes: int
    """Bytes of an element."""
    scale_block: int | None = None
    """Elements of a weight that share a scale; None for no scales."""
    scale_bytes: int = 4
    """Bytes of a scale."""
    by_row: bool = False
    """Whether blocks begin again in each row of a matrix; else they go through the flattened weight."""
    smallest: int = 0
    """Weights of fewer elements keep the state in fp32."""

    def bytes(self, numel: int) -> int:
        """Bytes of the state of a weight of `numel` elements in one row."""
        return self.slice_bytes(0, numel, max(numel, 1))

    def slice_bytes(self, start: int, stop: int, columns: int) -> int:
        """Bytes of the state of the elements [start, stop) of a flattened weight with `columns` elements in a row."""
        if stop - start < self.smallest:
            return FP32.element_bytes * (stop - start)
        return self.element_bytes * (stop - start) + self.scale_bytes * self._num_scales(start, stop, columns)

    def _num_scales(self, start: int, stop: int, columns: int) -> int:
        """Blocks that hold some of the elements."""
        if not self.scale_block or start >= stop:
            return 0
        if not self.by_row:
            return -(-(stop - start) // self.scale_block)
        in_row = -(-columns // self.scale_block)
        first, last = (index // columns * in_row + index % columns // self.scale_block for index in (start, stop - 1))
        return last - first + 1


FP32, BF16, INT8 = Format("fp32", 4), Format("bf16", 2), Format("int8", 1)
REMAINDER_BITS, CORRECTION_BITS = Format(REMAINDER, 2), Format(CORRECTION, 1)
SIGNED_BLOCKS = Format("signed blocks", 1, scale_block=MOMENT_BLOCK, scale_bytes=2, by_row=True)
UNSIGNED_BLOCKS = replace(SIGNED_BLOCKS, name="unsigned blocks")

MAIN_WEIGHT_NAMES = {FP32: MAIN_WEIGHT, REMAINDER_BITS: REMAINDER, CORRECTION_BITS: CORRECTION}
"""Name of the optimizer state that completes a bf16 weight, by its format."""


@dataclass(frozen=True)
class Recipe:
    """The states of a weight."""

    weight: Format
    """The weight."""
    gradient: Format
    """The gradient of a trained weight."""
    main: Format | None
    """The state that completes a trained bf16 weight to an fp32 main weight; None if there is no main weight."""
    first_moment: Format = FP32
    """Adam's first moment of a matrix, if it is trained."""
    second_moment: Format = FP32
    """Adam's second moment of a matrix, if it is trained."""
    frozen_matrix: Format | None = None
    """The matrix of a frozen linear, with a scale for each row; None for the format of weights."""
    rule: Rule = "adamw"
    """`optimizer.rule`: Muon keeps no second moment of the weights that it trains."""
    momentum: Format | None = None
    """Muon's momentum; None for the format of first moments."""

    @property
    def is_compact(self) -> bool:
        """Whether the optimizer works on bf16 weights, without fp32 main weights beside them."""
        return self.weight == BF16 and self.main != FP32

    def keeps_states_of(self, other: "Recipe") -> bool:
        """Whether optimizer states by the recipe `other` are by this one, too."""
        return replace(self, gradient=other.gradient, frozen_matrix=other.frozen_matrix) == other

    def rounds(self, other: "Recipe") -> str:
        """Say in words what of states by the recipe `other` has no room in this one; empty if nothing is lost."""
        lost = []
        if self.first_moment.scale_block and not other.first_moment.scale_block:
            lost.append("the moments of matrices are rounded to 8 bits")
        bits = {FP32: 32, BF16: 16, SIGNED_BLOCKS: 8}
        new, old = (bits.get(one.momentum or one.first_moment, 0) for one in (self, other))
        if self.rule == "muon" and new < old and 16 in (new, old):  # from 32 to 8 bits, all moments are rounded
            lost.append(f"Muon's momentum is rounded to {new} bits")
        kept = {FP32: 32, REMAINDER_BITS: 32, CORRECTION_BITS: 24, None: 16}
        if self.weight == BF16 and kept[self.main] < kept[other.main]:
            lost.append(f"main weights are rounded to {kept[self.main]} bits")
        return " and ".join(lost)

    def optimizer_states(self, key: str, shape: Sequence[int]) -> dict[str, Format]:
        """Return the optimizer states of the trained weight `key` of lengths `shape`, by their names in checkpoints.

        A state with scales has them in a second tensor, whose name has SCALE_SUFFIX at its end.
        """
        states = dict(zip(MOMENTS, (self.first_moment, self.second_moment)))
        if len(shape) < 2:
            states = {name: FP32 if format.by_row else format for name, format in states.items()}
        if rule_of(key, shape, self.rule) == "muon":
            states = {FIRST_MOMENT: self.momentum or self.first_moment}
        return states if self.main is None else {**states, MAIN_WEIGHT_NAMES[self.main]: self.main}

    def optimizer_bytes(self, key: str, shape: Sequence[int], start: int = 0, stop: int | None = None) -> int:
        """Bytes of the optimizer states of the elements [start, stop) of a trained weight of lengths `shape`."""
        stop = prod(shape) if stop is None else stop
        return sum(state.slice_bytes(start, stop, shape[-1]) for state in self.optimizer_states(key, shape).values())

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
            self.trained_bytes(parameter.numel) + self.optimizer_bytes(parameter.key, parameter.shape)
            if parameter.treatment.trained
            else self.frozen_bytes(parameter)
            for parameter in parameters
        )

    def resting_bytes(self, parameters: Sequence[Parameter], owners: int) -> int:
        """Bytes that the optimizer states of resting weights take on the host, on the fullest of `owners` data-parallel
        ranks, which divide each weight's states."""
        resting = {parameter.shape: parameter.key for parameter in parameters if parameter.treatment.rests}
        counts = Counter(parameter.shape for parameter in parameters if parameter.treatment.rests)
        ranks = [0] * owners
        for shape, count in counts.items():
            for rank in range(owners):
                own = share(prod(shape), owners, rank)
                ranks[rank] += count * self.optimizer_bytes(resting[shape], shape, *own)
        return max(ranks)

    def saved_bytes(self, parameters: Sequence[Parameter], owners: int) -> int:
        """Bytes that one rank saves of `parameters`: the weights, and its share of the optimizer states of the
        trained and resting ones, which `owners` data-parallel ranks divide."""
        states = sum(self.optimizer_bytes(one.key, one.shape) for one in parameters if one.treatment.has_states)
        return sum(self.weight.bytes(one.numel) for one in parameters) + -(-states // owners)

    def largest_tensor_bytes(self, parameter: Parameter) -> int:
        """Bytes of the largest tensor that a checkpoint has of a weight: the weight, or one of its states."""
        formats = [self.weight]
        if parameter.treatment.has_states:
            formats += self.optimizer_states(parameter.key, parameter.shape).values()
        return max(format.element_bytes for format in formats) * parameter.numel


def share(numel: int, owners: int, rank: int) -> tuple[int, int]:
    """Return the first element that `rank` has, and the one after its last, if `owners` ranks divide `numel`."""
    size = -(-numel // owners)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def copied_in_growth(layer: int, largest: int) -> int:
    """The most bytes that growth needs beside the model: for a layer of `layer` elements, or to read a
    checkpoint whose largest tensor has `largest` elements.

    A layer's weights are read in bf16, and summed in fp32 for means and merged adapters. Optimizer states, and weights
    outside the layers, are read into their place; an fp32 tensor that is read is there beside the one before it.
    """
    return max(BF16.bytes(layer) + FP32.bytes(layer), 2 * FP32.bytes(largest))


_FULL = Recipe(weight=BF16, gradient=FP32, main=FP32)
_BLOCK_256 = replace(INT8, scale_block=256, smallest=4096)
_ADAM8BIT = replace(_FULL, first_moment=_BLOCK_256, second_moment=_BLOCK_256)
_COMPACT = Recipe(
    weight=BF16, gradient=BF16, main=REMAINDER_BITS, first_moment=SIGNED_BLOCKS, second_moment=UNSIGNED_BLOCKS
)

RECIPES = {
    "fp32": Recipe(weight=FP32, gradient=FP32, main=None),
    "full": _FULL,
    "exact": replace(_FULL, main=REMAINDER_BITS),
    "compact": _COMPACT,
    "smallest": replace(_COMPACT, main=None),
    "paper": replace(_FULL, gradient=BF16),
    "adam8bit": _ADAM8BIT,
    "int8_base": replace(_FULL, frozen_matrix=INT8),
    "adam8bit_int8_base": replace(_ADAM8BIT, frozen_matrix=INT8),
}
"""The recipes by name: `fp32` is that of training.precision fp32, the others are of bf16 weights."""


def weight_format(precision: str) -> Format:
    """Return the format of the weights at `training.precision`."""
    return FP32 if precision == "fp32" else BF16


def activation_format(precision: str) -> Format:
    """Return the format of activations and products at `training.precision`."""
    return BF16 if precision == "bf16" else FP32


def recipe_of(config: RunConfig) -> Recipe:
    """Return the recipe that is counted by: `planner.recipe`, or the one of training."""
    return _by_rule(RECIPES[config.planner.recipe], config) if config.planner.recipe else training_recipe(config)


def training_recipe(config: RunConfig) -> Recipe:
    """Return the recipe that a run trains with."""
    optimizer = config.optimizer
    if config.training.precision == "fp32":
        return _by_rule(RECIPES["fp32"], config)
    recipe = _by_rule(RECIPES[optimizer.states], config)
    if optimizer.gradients is not None:
        recipe = replace(recipe, gradient={"fp32": FP32, "bf16": BF16}[optimizer.gradients])
    if optimizer.momentum_bits == 16:
        recipe = replace(recipe, momentum=BF16)
    return replace(recipe, main=CORRECTION_BITS) if optimizer.correction_bits == 8 else recipe


def _by_rule(recipe: Recipe, config: RunConfig) -> Recipe:
    return recipe if config.optimizer.rule == recipe.rule else replace(recipe, rule=config.optimizer.rule)

"""Bytes of weights, gradients and optimizer states: precision recipes as data.

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

from megatron_step.config.run import RunConfig
from megatron_step.plan.names import layer_of
from megatron_step.planner.parameters import Parameter

_SCALE_BYTES = 4


@dataclass(frozen=True)
class Blocks:
    """How numbers of 8 bits are scaled."""

    size: int
    """Elements that share an fp32 scale."""
    smallest: int
    """Elements of the smallest tensor that is kept in 8 bits."""


@dataclass(frozen=True)
class Recipe:
    """Bytes of one element of a weight, and what belongs to it."""

    weight_bytes: int
    """The weight."""
    gradient_bytes: int
    """Its gradient, if it is trained."""
    main_weight_bytes: int
    """Its copy in fp32, if it is trained and narrower itself."""
    moment_blocks: Blocks | None = None
    """How Adam's two moments are kept in 8 bits; None for fp32."""
    int8_base: bool = False
    """Whether the matrices of frozen linears take a byte, and an fp32 scale for each row."""

    def optimizer_bytes(self, numel: int) -> int:
        """Main weight and moments of `numel` elements of one trained weight."""
        blocks = self.moment_blocks
        if blocks is None or numel < blocks.smallest:
            moment = 4 * numel
        else:
            moment = numel + _SCALE_BYTES * -(-numel // blocks.size)
        return self.main_weight_bytes * numel + 2 * moment

    def frozen_bytes(self, parameter: Parameter) -> int:
        """A frozen weight."""
        if self.int8_base and layer_of(parameter.key) >= 0 and len(parameter.shape) == 2:
            return parameter.numel + _SCALE_BYTES * parameter.shape[0]
        return self.weight_bytes * parameter.numel

    def state_bytes(self, parameters: Sequence[Parameter]) -> int:
        """Model states of `parameters` on one data-parallel rank, without padding."""
        of_trained = self.weight_bytes + self.gradient_bytes
        return sum(
            parameter.numel * of_trained + self.optimizer_bytes(parameter.numel)
            if parameter.treatment.trained
            else self.frozen_bytes(parameter)
            for parameter in parameters
        )


_BF16 = Recipe(weight_bytes=2, gradient_bytes=4, main_weight_bytes=4)
_ADAM8BIT = replace(_BF16, moment_blocks=Blocks(size=256, smallest=4096))

RECIPES = {
    "fp32": Recipe(weight_bytes=4, gradient_bytes=4, main_weight_bytes=0),
    "bf16": _BF16,
    "paper": replace(_BF16, gradient_bytes=2),
    "adam8bit": _ADAM8BIT,
    "int8_base": replace(_BF16, int8_base=True),
    "adam8bit_int8_base": replace(_ADAM8BIT, int8_base=True),
}
"""What `training.precision` and `planner.recipe` stand for. Training keeps and reduces gradients in fp32."""


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe that is counted by: `planner.recipe`, or the one of training."""
    return RECIPES[config.planner.recipe or config.training.precision]

"""A transformer layer: its self-attention and its MLP, each with the norm before it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from megatron_step.config.model import ModelConfig
from megatron_step.config.stages import Target
from megatron_step.plan.blocks.attention import Attention, attention_of
from megatron_step.plan.blocks.core_attention import CoreAttention
from megatron_step.plan.blocks.linear import Handling, Linear
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.mlp import Mlp, mlp_of
from megatron_step.plan.blocks.tape import Tape, Use


@dataclass(frozen=True)
class Layer:
    """A layer of blocks."""

    attention: Attention
    """Its self-attention."""
    mlp: Mlp
    """Its MLP."""

    def linears(self) -> dict[Target, Linear]:
        """Its linears."""
        return self.attention.linears() | self.mlp.linears()

    def weights(self, tensor: int, ranks: Mapping[Target, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names below the layer's and shapes on one of `tensor` ranks, in the order of the modules."""
        yield from self.attention.weights(tensor, ranks)
        yield from self.mlp.weights(tensor, ranks)

    def use(
        self, batch: Microbatch, handling: Mapping[Target, Handling], core: CoreAttention, recomputes_core: bool
    ) -> Use:
        """Bytes of a micro-batch."""
        kept = self.attention.kept(batch, handling, core, recomputes_core) + self.mlp.kept(batch, handling)
        tape = Tape(kept + batch.stream(self.mlp.hidden))  # the gradient of the output comes in
        self.mlp.backward(tape, batch, handling)
        self.attention.backward(tape, batch, handling, core, recomputes_core)
        return Use(kept, tape.peak)

    def flops(self, handling: Mapping[Target, Handling]) -> int:
        """Operations of a training step for a token."""
        products = sum(linear.flops(handling[target]) for target, linear in self.linears().items())
        return products + 3 * self.attention.core.flops()

    def forward_flops(self) -> int:
        """Operations of its forward pass for a token, without adapters."""
        return sum(linear.forward_flops() for linear in self.linears().values()) + self.attention.core.flops()


@cache
def layer_blocks(model: ModelConfig) -> Layer:
    """Return the layer of a model; the result is cached."""
    return Layer(attention_of(model), mlp_of(model))


def layer_linears(model: ModelConfig) -> dict[Target, Linear]:
    """The linears of a layer, in the order that numbers them."""
    return layer_blocks(model).linears()

"""A transformer layer: its self-attention and its MLP, each with the norm before it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.attention import Attention
from megatron_step.plan.blocks.core_attention import CoreAttention
from megatron_step.plan.blocks.linear import Handling, Linear
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.mlp import Mlp
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

    def stream(self, batch: Microbatch) -> int:
        """Return the bytes of the residual stream that a rank keeps."""
        return batch.stream(self.mlp.hidden)

    def whole_stream(self, batch: Microbatch) -> int:
        """Return the bytes of the residual stream, gathered from all ranks."""
        return batch.whole(self.mlp.hidden)

    def use(
        self, batch: Microbatch, handling: Mapping[Target, Handling], core: CoreAttention, recomputes_core: bool
    ) -> Use:
        """Bytes of a micro-batch."""
        kept = self.attention.kept(batch, handling, core, recomputes_core) + self.mlp.kept(batch, handling)
        tape = Tape(kept + self.stream(batch))  # the gradient of the output comes in
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

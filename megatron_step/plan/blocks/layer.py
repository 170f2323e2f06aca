"""Costs of a transformer layer: self-attention and MLP, each with the norm before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.attention import Attention
from megatron_step.plan.blocks.core_attention import CoreAttention
from megatron_step.plan.blocks.linear import Handling, Linear
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.mlp import Mlp
from megatron_step.plan.blocks.tape import Tape, Use, Weights


@dataclass(frozen=True)
class LayerCosts:
    """Costs of a layer on a rank, with one micro-batch."""

    weights: Weights
    """The layer's weights, by their names within the layer."""
    use: Use
    """Bytes of the micro-batch."""
    flops: int
    """Operations of a training step per token, on all tensor-parallel ranks."""
    recomputed_flops: int
    """Operations per token that recomputation adds, on all tensor-parallel ranks."""
    exchanged_bytes: int
    """Bytes that a tensor-parallel rank sends to the others, forward and backward."""


@dataclass(frozen=True)
class Layer:
    """The sizes of a layer."""

    attention: Attention
    """The self-attention."""
    mlp: Mlp
    """The MLP."""

    def linears(self) -> dict[Target, Linear]:
        """Return the layer's linears by target."""
        return self.attention.linears() | self.mlp.linears()

    def stream(self, batch: Microbatch) -> int:
        """Return the bytes of the residual stream that a rank keeps."""
        return batch.stream(self.mlp.hidden)

    def whole_stream(self, batch: Microbatch) -> int:
        """Return the bytes of the whole residual stream, gathered from all tensor-parallel ranks."""
        return batch.whole(self.mlp.hidden)

    def costs(
        self,
        batch: Microbatch,
        handling: Mapping[Target, Handling],
        core: CoreAttention,
        recompute: Literal["none", "selective", "full"],
    ) -> LayerCosts:
        """Return the costs of the layer. `handling` says what the stage does with each linear."""
        linears = {target: linear.costs(batch, handling[target]) for target, linear in self.linears().items()}
        attention = self.attention.costs(batch, linears, core, recompute == "selective")
        mlp = self.mlp.costs(batch, linears)
        kept, stream = attention.kept + mlp.kept, self.stream(batch)
        tape = Tape(kept + stream)  # the gradient of the output comes in
        tape.follow(mlp.backward)
        tape.follow(attention.backward)
        is_recomputed, core_flops = recompute == "full", self.attention.core.flops()
        forward_flops = sum(linear.forward_flops for linear in linears.values()) + core_flops
        # Two all-reduces forward and two backward. In each, a rank sends 2 (t - 1) / t of the tensor's bytes.
        exchanges = (6 if is_recomputed else 4) * 2 * (batch.tensor - 1)
        return LayerCosts(
            weights=(*attention.weights, *mlp.weights),
            # A recomputed layer keeps its input only. Recomputation brings back the rest, and the layer's output.
            use=Use(stream, tape.peak + stream) if is_recomputed else Use(kept, tape.peak),
            flops=sum(linear.flops for linear in linears.values()) + 3 * core_flops,
            recomputed_flops=forward_flops if is_recomputed else 0,
            exchanged_bytes=exchanges * self.whole_stream(batch) // batch.tensor,
        )

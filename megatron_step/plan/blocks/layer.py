"""A transformer layer: its self-attention and its MLP, each with the norm before it."""

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
    """What a layer takes on a rank, with one micro-batch."""

    weights: Weights
    """Its weights, by their names below the layer's."""
    use: Use
    """Bytes of the micro-batch."""
    flops: int
    """Operations of a training step for a token."""
    recomputed_flops: int
    """Operations that are computed a second time, for a token."""
    exchanged_bytes: int
    """Bytes that a tensor-parallel rank sends to the others."""


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

    def stream(self, batch: Microbatch) -> int:
        """Return the bytes of the residual stream that a rank keeps."""
        return batch.stream(self.mlp.hidden)

    def whole_stream(self, batch: Microbatch) -> int:
        """Return the bytes of the residual stream, gathered from all ranks."""
        return batch.whole(self.mlp.hidden)

    def costs(
        self,
        batch: Microbatch,
        handling: Mapping[Target, Handling],
        core: CoreAttention,
        recompute: Literal["none", "selective", "full"],
    ) -> LayerCosts:
        """Return all that it takes. `handling` is what the stage does with each linear."""
        linears = {target: linear.costs(batch, handling[target]) for target, linear in self.linears().items()}
        attention = self.attention.costs(batch, linears, core, recompute == "selective")
        mlp = self.mlp.costs(batch, linears)
        kept, stream = attention.kept + mlp.kept, self.stream(batch)
        tape = Tape(kept + stream)  # the gradient of the output comes in
        tape.follow(mlp.backward)
        tape.follow(attention.backward)
        is_recomputed, core_flops = recompute == "full", self.attention.core.flops()
        forward_flops = sum(linear.forward_flops for linear in linears.values()) + core_flops
        # Two sums over ranks forward and two backward, each of which sends 2 (t - 1) / t of its tensor.
        exchanges = (6 if is_recomputed else 4) * 2 * (batch.tensor - 1)
        return LayerCosts(
            weights=(*attention.weights, *mlp.weights),
            # A layer that is recomputed keeps its input, and computes itself and its output again.
            use=Use(stream, tape.peak + stream) if is_recomputed else Use(kept, tape.peak),
            flops=sum(linear.flops for linear in linears.values()) + 3 * core_flops,
            recomputed_flops=forward_flops if is_recomputed else 0,
            exchanged_bytes=exchanges * self.whole_stream(batch) // batch.tensor,
        )

"""An RMSNorm: one weight, whole on every rank."""

from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import BlockCosts, Tape, Weights


@dataclass(frozen=True)
class Norm:
    """A norm of vectors of `size`."""

    key: str
    """Its weight's name below the layer's, or its key outside the layers."""
    size: int
    """Elements of its weight."""

    @property
    def weights(self) -> Weights:
        """Name and shape of its weight."""
        return ((self.key, (self.size,)),)

    def costs(self, batch: Microbatch) -> BlockCosts:
        """Return what a norm of the residual stream takes. It keeps its input, and a scale of each token.

        Its backward pass ends with the sum of its input's gradient and the stream's own.
        """
        stream = batch.stream(self.size)
        kept, tape = stream + batch.norm_scale, Tape()
        tape.take(stream)
        tape.free(kept, stream)
        tape.take(stream)  # the sum
        tape.free(2 * stream)
        return BlockCosts(self.weights, kept, tape)

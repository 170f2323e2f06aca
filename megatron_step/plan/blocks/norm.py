"""Bytes of an RMSNorm. Every rank holds its whole weight."""

from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import BlockCosts, Tape, Weights


@dataclass(frozen=True)
class Norm:
    """An RMSNorm of vectors of `size` elements."""

    key: str
    """Name of the weight within its layer, or the weight's key if the norm is outside the layers."""
    size: int
    """Number of elements of the weight."""

    @property
    def weights(self) -> Weights:
        """Name and shape of the weight."""
        return ((self.key, (self.size,)),)

    def costs(self, batch: Microbatch) -> BlockCosts:
        """Return the costs of a norm of the residual stream.

        The norm keeps its input and one scale per token. Its backward pass ends by adding the gradient of its input to
        the gradient that flows past it in the residual stream.
        """
        stream = batch.stream(self.size)
        kept, tape = stream + batch.norm_scale, Tape()
        tape.take(stream)
        tape.free(kept, stream)
        tape.take(stream)  # the sum
        tape.free(2 * stream)
        return BlockCosts(self.weights, kept, tape)

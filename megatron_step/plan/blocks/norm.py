"""An RMSNorm: one weight, whole on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import Tape


@dataclass(frozen=True)
class Norm:
    """A norm of vectors of `size`."""

    key: str
    """Its weight's name below the layer's, or its key outside the layers."""
    size: int
    """Elements of its weight."""

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of its weight."""
        yield self.key, (self.size,)

    def kept(self, batch: Microbatch) -> int:
        """Bytes kept for the backward pass of a norm of the residual stream: its input, and a scale of each token."""
        return batch.stream(self.size) + batch.norm_scale

    def backward(self, tape: Tape, batch: Microbatch) -> None:
        """From its output's gradient, in the residual stream, to the sum of its input's with the stream's own."""
        stream = batch.stream(self.size)
        tape.take(stream)
        tape.free(self.kept(batch), stream)
        tape.take(stream)  # the sum
        tape.free(2 * stream)

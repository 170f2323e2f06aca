"""The final norm, the output layer, split by rows over ranks, and the loss (ops/linear_cross_entropy.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_step.plan.blocks.linear import weight_gradient
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import Use
from megatron_step.plan.names import EMBEDDING, FINAL_NORM, OUTPUT_LAYER


@dataclass(frozen=True)
class Head:
    """A head of plain numbers."""

    rows: int
    """Rows of the output layer, with padding."""
    hidden: int
    """Width of the residual stream."""
    tied: bool
    """Whether its output layer is the embedding."""
    vocab_size: int
    """Rows of the output layer that stand for a token."""

    @property
    def output_key(self) -> str:
        """Key of the output layer's weight."""
        return EMBEDDING if self.tied else OUTPUT_LAYER

    @cached_property
    def norm(self) -> Norm:
        """The final norm."""
        return Norm(FINAL_NORM, self.hidden)

    def weights(self, tensor: int, holds_embedding: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Keys and shapes on one of `tensor` ranks, of a chunk that holds the embedding as well or does not."""
        yield from self.norm.weights()
        if not (self.tied and holds_embedding):
            yield self.output_key, (self.rows // tensor, self.hidden)

    def use(self, batch: Microbatch, trained: bool) -> Use:
        """Bytes of a micro-batch; `trained` says whether the output layer's weight is."""
        rows, hidden = self.rows // batch.tensor, batch.whole(self.hidden)
        # For a token: its largest logit, its total and its label's logit in fp64, its label, whether it counts.
        kept = self.norm.kept(batch) + hidden + batch.whole(rows) + batch.tokens * (3 * 8 + 8 + 1)
        weight = weight_gradient(rows, self.hidden, batch.element_bytes) if trained else 0
        losses = 3 * 4 * batch.tokens  # losses, their gradients, these times counted
        return Use(kept, kept + losses + hidden + weight)

    def flops(self, trained: bool) -> int:
        """Return the operations of the output layer in a training step, for a token."""
        return (6 if trained else 4) * self.hidden * self.vocab_size

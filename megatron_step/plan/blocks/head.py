"""The final norm, the output layer, split by rows over ranks, and the loss (ops/linear_cross_entropy.py)."""

from dataclasses import dataclass
from functools import cached_property

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import Use, Weights
from megatron_step.plan.names import EMBEDDING, FINAL_NORM, OUTPUT_LAYER


@dataclass(frozen=True)
class HeadCosts:
    """What a head takes on a rank, with one micro-batch."""

    weights: Weights
    """The final norm, and the output layer unless the chunk's embedding is its weight."""
    use: Use
    """Bytes of the micro-batch."""
    flops: int
    """Operations of the output layer in a training step, for a token."""


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

    def costs(self, batch: Microbatch, *, trained: bool, holds_embedding: bool) -> HeadCosts:
        """Return what it takes.

        `trained` says whether the output layer's weight is, and `holds_embedding` whether its chunk has the embedding.
        """
        rows, hidden, norm = self.rows // batch.tensor, batch.whole(self.hidden), self.norm.costs(batch)
        weights = norm.weights
        if not (self.tied and holds_embedding):
            weights = (*weights, (self.output_key, (rows, self.hidden)))
        # For a token: its largest logit, its total and its label's logit in fp64, its label, whether it counts.
        kept = norm.kept + hidden + batch.whole(rows) + batch.tokens * (3 * 8 + 8 + 1)
        gradient = batch.weight_gradient(rows, self.hidden) if trained else batch.widened(rows, self.hidden)
        losses = 3 * 4 * batch.tokens  # losses, their gradients, these times counted
        return HeadCosts(
            weights=weights,
            use=Use(kept, kept + losses + hidden + gradient),
            flops=(6 if trained else 4) * self.hidden * self.vocab_size,
        )

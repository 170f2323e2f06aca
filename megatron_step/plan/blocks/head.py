"""Costs of the head: the final norm, the output layer, and the loss (ops/linear_cross_entropy.py).

The rows of the output layer are split over tensor-parallel ranks.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import Use, Weights
from megatron_step.plan.names import EMBEDDING, FINAL_NORM, OUTPUT_LAYER


@dataclass(frozen=True)
class HeadCosts:
    """Costs of a head on a rank, with one micro-batch."""

    weights: Weights
    """The final norm, and the output layer unless it shares the weight of the chunk's embedding."""
    use: Use
    """Bytes of the micro-batch."""
    flops: int
    """Operations of the output layer in a training step per token, on all tensor-parallel ranks."""


@dataclass(frozen=True)
class Head:
    """The sizes of a head."""

    rows: int
    """Rows of the whole output layer, with padding."""
    hidden: int
    """Width of the residual stream."""
    tied: bool
    """Whether the output layer shares the embedding's weight."""
    vocab_size: int
    """Rows of the whole output layer, without padding: one per token of the vocabulary."""

    @property
    def output_key(self) -> str:
        """Key of the output layer's weight."""
        return EMBEDDING if self.tied else OUTPUT_LAYER

    @cached_property
    def norm(self) -> Norm:
        """The final norm."""
        return Norm(FINAL_NORM, self.hidden)

    def costs(self, batch: Microbatch, *, trained: bool, holds_embedding: bool) -> HeadCosts:
        """Return the costs of the head.

        `trained` says whether the output layer is trained, and `holds_embedding` whether the embedding is in the same
        chunk.
        """
        rows, hidden, norm = self.rows // batch.tensor, batch.whole(self.hidden), self.norm.costs(batch)
        weights = norm.weights
        if not (self.tied and holds_embedding):
            weights = (*weights, (self.output_key, (rows, self.hidden)))
        # For each token: the largest logit, the sum of exponentials and the label's logit in fp64; the label; whether
        # the token counts.
        kept = norm.kept + hidden + batch.whole(rows) + batch.tokens * (3 * 8 + 8 + 1)
        gradient = batch.weight_gradient(rows, self.hidden) if trained else batch.widened(rows, self.hidden)
        losses = 3 * 4 * batch.tokens  # losses, their gradients, and those gradients with ignored tokens set to 0
        return HeadCosts(
            weights=weights,
            use=Use(kept, kept + losses + hidden + gradient),
            flops=(6 if trained else 4) * self.hidden * self.vocab_size,
        )

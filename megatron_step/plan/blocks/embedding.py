"""Bytes of the token embedding, whose rows are split over tensor-parallel ranks."""

from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import Weights
from megatron_step.plan.names import EMBEDDING


@dataclass(frozen=True)
class EmbeddingCosts:
    """Costs of an embedding on a rank, with one micro-batch."""

    weights: Weights
    """The rank's rows of the table."""
    kept: int
    """Bytes kept from the forward to the backward pass."""
    gradient: int
    """Bytes of the table's gradient, in the type in which it is computed."""
    backward: int
    """Bytes in use during the backward pass."""


@dataclass(frozen=True)
class Embedding:
    """The sizes of an embedding."""

    rows: int
    """Rows of the whole table, with padding."""
    hidden: int
    """Width of the residual stream."""

    def costs(self, batch: Microbatch) -> EmbeddingCosts:
        """Return the costs of the embedding.

        The forward pass keeps a mask of the tokens whose rows are on other ranks, and each token's row number on this
        rank. The backward pass holds the output's gradient, the sum of this gradient over ranks, and the table's
        gradient.
        """
        rows = self.rows // batch.tensor
        gradient = batch.matrix(rows, self.hidden)
        return EmbeddingCosts(
            weights=((EMBEDDING, (rows, self.hidden)),),
            kept=(1 + 8) * batch.tokens if batch.tensor > 1 else 0,
            gradient=gradient,
            backward=2 * batch.whole(self.hidden) + batch.stream(self.hidden) + gradient,
        )

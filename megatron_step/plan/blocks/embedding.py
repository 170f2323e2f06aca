"""The token embedding, split by rows over tensor-parallel ranks."""

from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import Weights
from megatron_step.plan.names import EMBEDDING


@dataclass(frozen=True)
class EmbeddingCosts:
    """What an embedding takes on a rank, with one micro-batch."""

    weights: Weights
    """Its table."""
    kept: int
    """Bytes from its forward to its backward pass."""
    gradient: int
    """Bytes of the table's gradient, as it is made."""
    backward: int
    """Bytes of its backward pass."""


@dataclass(frozen=True)
class Embedding:
    """An embedding of plain numbers."""

    rows: int
    """Rows of the table, with padding."""
    hidden: int
    """Width of the residual stream."""

    def costs(self, batch: Microbatch) -> EmbeddingCosts:
        """Return what it takes.

        It keeps which tokens have their rows on other ranks, and the number of each one's row here. Its backward pass
        has the output's gradient, its sum over ranks, and the table's gradient.
        """
        rows = self.rows // batch.tensor
        gradient = batch.matrix(rows, self.hidden)
        return EmbeddingCosts(
            weights=((EMBEDDING, (rows, self.hidden)),),
            kept=(1 + 8) * batch.tokens if batch.tensor > 1 else 0,
            gradient=gradient,
            backward=2 * batch.whole(self.hidden) + batch.stream(self.hidden) + gradient,
        )

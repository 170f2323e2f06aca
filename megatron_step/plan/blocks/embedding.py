"""The token embedding, split by rows over tensor-parallel ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.names import EMBEDDING


@dataclass(frozen=True)
class Embedding:
    """An embedding of plain numbers."""

    rows: int
    """Rows of the table, with padding."""
    hidden: int
    """Width of the residual stream."""

    def weights(self, tensor: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of the table on one of `tensor` ranks."""
        yield EMBEDDING, (self.rows // tensor, self.hidden)

    def gradient(self, batch: Microbatch) -> int:
        """Bytes of the table's gradient on a rank, as it is made."""
        return self.rows // batch.tensor * self.hidden * batch.element_bytes

    def kept(self, batch: Microbatch) -> int:
        """Bytes from its forward to its backward pass: of tokens whose rows are on other ranks, where they are, and the
        number of each one's row here."""
        return (1 + 8) * batch.tokens if batch.tensor > 1 else 0

    def backward(self, batch: Microbatch) -> int:
        """Bytes of its backward pass: the output's gradient, its sum over ranks, and the table's gradient."""
        return 2 * batch.whole(self.hidden) + batch.stream(self.hidden) + self.gradient(batch)

"""A micro-batch on a tensor-parallel rank, and the bytes of its tensors."""

from dataclasses import dataclass

from megatron_step.plan.states import WIDENED_ELEMENTS


@dataclass(frozen=True)
class Microbatch:
    """T tokens on one of t tensor-parallel ranks, with e bytes per element."""

    tokens: int
    """Number of tokens, T."""
    element_bytes: int
    """Bytes of an element, e."""
    tensor: int
    """Number of tensor-parallel ranks, t."""
    sequence_parallel: bool
    """Whether norms and residuals are split over the sequence."""
    widens_weights: bool = False
    """Whether weights have fewer bytes per element than the micro-batch, so that products widen the weights."""

    def whole(self, width: int) -> int:
        """Return the bytes of one vector of `width` per token, all on every rank: e T w."""
        return self.matrix(self.tokens, width)

    def split(self, width: int) -> int:
        """Return a rank's share of the bytes of one vector of `width` per token: e T w / t."""
        return self.whole(width) // self.tensor

    def stream(self, width: int) -> int:
        """Return a rank's bytes of the residual stream: its share with sequence parallelism, else the whole stream."""
        return self.split(width) if self.sequence_parallel else self.whole(width)

    def matrix(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix in the micro-batch's number format."""
        return rows * columns * self.element_bytes

    def weight_gradient(self, rows: int, columns: int) -> int:
        """Return the bytes in use while a weight's gradient is computed.

        oneDNN's fp32 product of a weight with more rows than columns is transposed into a copy (ops/linear.py). On CPUs
        without AVX-512, the BLAS computes the product without a copy. The plan counts the copy for both kinds of CPU.
        """
        return self.matrix(rows, columns) * (2 if self.element_bytes == 4 and rows > columns else 1)

    def widened(self, rows: int, columns: int) -> int:
        """Return the bytes of the block of rows that a product widens to the micro-batch's number format at a time."""
        if not self.widens_weights:
            return 0
        return self.matrix(min(rows, max(1, WIDENED_ELEMENTS // columns)), columns)

    @property
    def norm_scale(self) -> int:
        """Bytes of the scales that a norm keeps, one fp32 number per token."""
        return 4 * self.tokens // (self.tensor if self.sequence_parallel else 1)

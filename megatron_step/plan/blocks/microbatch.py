"""A micro-batch on a tensor-parallel rank: the bytes of its tensors, from which every block counts."""

from dataclasses import dataclass

from megatron_step.plan.states import WIDENED_ELEMENTS


@dataclass(frozen=True)
class Microbatch:
    """T tokens on one of t tensor-parallel ranks, e bytes an element."""

    tokens: int
    """T."""
    element_bytes: int
    """e."""
    tensor: int
    """t."""
    sequence_parallel: bool
    """Whether norms and residuals are split over the sequence."""
    widens_weights: bool = False
    """Whether weights have fewer bytes an element, so that a product widens them."""

    def whole(self, width: int) -> int:
        """Bytes of vectors of `width` that every rank holds: e T w."""
        return self.matrix(self.tokens, width)

    def split(self, width: int) -> int:
        """Bytes of vectors of `width` of which a rank holds its share: e T w / t."""
        return self.whole(width) // self.tensor

    def stream(self, width: int) -> int:
        """Bytes of vectors of the residual stream: a share with sequence parallelism, else whole."""
        return self.split(width) if self.sequence_parallel else self.whole(width)

    def matrix(self, rows: int, columns: int) -> int:
        """Bytes of a matrix in the number format of the micro-batch."""
        return rows * columns * self.element_bytes

    def weight_gradient(self, rows: int, columns: int) -> int:
        """Bytes of a weight's gradient as it is made: oneDNN's fp32 product is turned round (ops/linear.py).

        The BLAS, which takes the product on CPUs without AVX-512, needs no copy; a plan covers both kinds of CPU.
        """
        return self.matrix(rows, columns) * (2 if self.element_bytes == 4 and rows > columns else 1)

    def widened(self, rows: int, columns: int) -> int:
        """Bytes of the part of a matrix that a product holds in the micro-batch's wider format: a block of rows."""
        if not self.widens_weights:
            return 0
        return self.matrix(min(rows, max(1, WIDENED_ELEMENTS // columns)), columns)

    @property
    def norm_scale(self) -> int:
        """Bytes of a norm's scale of each token, fp32."""
        return 4 * self.tokens // (self.tensor if self.sequence_parallel else 1)

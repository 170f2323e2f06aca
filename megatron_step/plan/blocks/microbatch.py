"""A micro-batch on a tensor-parallel rank: the bytes of its tensors, from which every block counts."""

from dataclasses import dataclass


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

    @property
    def norm_scale(self) -> int:
        """Bytes of a norm's scale of each token, fp32."""
        return 4 * self.tokens // (self.tensor if self.sequence_parallel else 1)

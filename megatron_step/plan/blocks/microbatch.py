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
        return self.element_bytes * self.tokens * width

    def split(self, width: int) -> int:
        """Bytes of vectors of `width` of which a rank holds its share: e T w / t."""
        return self.whole(width) // self.tensor

    def stream(self, width: int) -> int:
        """Bytes of vectors of the residual stream: a share with sequence parallelism, else whole."""
        return self.split(width) if self.sequence_parallel else self.whole(width)

    @property
    def norm_scale(self) -> int:
        """Bytes of a norm's scale of each token, fp32."""
        return 4 * self.tokens // (self.tensor if self.sequence_parallel else 1)

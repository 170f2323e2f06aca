"""Track the bytes in use during a backward pass, and hold the costs of a block."""

from dataclasses import dataclass

Weights = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of weights on a rank, in the order of the modules."""


class Tape:
    """Bytes in use (`live`), and the most bytes in use so far (`peak`)."""

    def __init__(self, live: int = 0) -> None:
        self.live = self.peak = live

    def take(self, *sizes: int) -> None:
        """Allocate tensors of these sizes in bytes."""
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)

    def free(self, *sizes: int) -> None:
        """Free tensors of these sizes in bytes."""
        self.live -= sum(sizes)

    def follow(self, other: "Tape") -> None:
        """Append the events of another tape, which began with 0 bytes in use."""
        self.peak = max(self.peak, self.live + other.peak)
        self.live += other.live


@dataclass(frozen=True)
class Use:
    """Bytes of one micro-batch in a layer or another module."""

    kept: int
    """Bytes kept from the forward to the backward pass."""
    backward: int
    """Most bytes in use during the backward pass, including the kept ones."""


@dataclass(frozen=True)
class BlockCosts:
    """Costs of a block on a rank, with one micro-batch."""

    weights: Weights
    """The block's weights."""
    kept: int
    """Bytes kept from the forward to the backward pass."""
    backward: Tape
    """Bytes in use during the backward pass, from the output's gradient to the input's gradient."""

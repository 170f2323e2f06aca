"""Follows the bytes in use through a backward pass, event by event, and sums up what a block takes."""

from dataclasses import dataclass

Weights = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of weights on a rank, in the order of the modules."""


class Tape:
    """Bytes in use, and the most so far."""

    def __init__(self, live: int = 0) -> None:
        self.live = self.peak = live

    def take(self, *sizes: int) -> None:
        """Allocate."""
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)

    def free(self, *sizes: int) -> None:
        """Let go."""
        self.live -= sum(sizes)

    def follow(self, other: "Tape") -> None:
        """Append the events of a tape that began with no bytes in use."""
        self.peak = max(self.peak, self.live + other.peak)
        self.live += other.live


@dataclass(frozen=True)
class Use:
    """Bytes of one micro-batch in a part of the model."""

    kept: int
    """From its forward to its backward pass."""
    backward: int
    """The most in its backward pass, with what it kept."""


@dataclass(frozen=True)
class BlockCosts:
    """What a block takes on a rank, with one micro-batch."""

    weights: Weights
    """Its weights."""
    kept: int
    """Bytes from its forward to its backward pass."""
    backward: Tape
    """Its backward pass, from the gradient of its output to the gradient of its input."""

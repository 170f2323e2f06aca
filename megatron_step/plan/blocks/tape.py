"""Follows the bytes in use through a backward pass, event by event."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """Bytes of one micro-batch in a part of the model."""

    kept: int
    """From its forward to its backward pass."""
    backward: int
    """The most in its backward pass, with what it kept."""


class Tape:
    """Bytes in use, and the most so far."""

    def __init__(self, live: int) -> None:
        self.live = self.peak = live

    def take(self, *sizes: int) -> None:
        """Allocate."""
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)

    def free(self, *sizes: int) -> None:
        """Let go."""
        self.live -= sum(sizes)

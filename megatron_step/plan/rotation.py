"""The layers that a rotation over a pipeline rank's old layers trains in each turn, as arithmetic on their numbers.

Of n layers, a are trained in a turn. The turn with the shift s trains layer i if

    (i + s) a mod n < a

So each turn trains a layers, spread evenly over the n. n / gcd(a, n) shifts are a cycle, in which every layer is
trained equally often.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from math import gcd


@dataclass(frozen=True)
class Rotation:
    """A rotation over layers that are numbered from 0."""

    num_layers: int
    """n."""
    num_active: int
    """a, from 1 to n."""
    turn_steps: int
    """Steps of a turn."""
    seed: str | None = None
    """Seed that orders the shifts of each cycle at random; None for rising shifts."""

    @property
    def num_shifts(self) -> int:
        """Turns of a cycle."""
        return self.num_layers // gcd(self.num_layers, self.num_active)

    def is_active(self, layer: int, turn: int) -> bool:
        """Return whether the layer is trained in the turn with the number `turn`, from 0."""
        return (layer + self._shift(turn)) * self.num_active % self.num_layers < self.num_active

    def active_steps(self, layer: int, steps: int) -> int:
        """Return how many of the first `steps` steps train the layer."""
        cycles, rest = divmod(steps, self.num_shifts * self.turn_steps)
        in_cycle = self.num_active * self.num_shifts // self.num_layers
        turns, in_turn = divmod(rest, self.turn_steps)
        first = cycles * self.num_shifts
        whole = sum(self.is_active(layer, turn) for turn in range(first, first + turns))
        begun = in_turn if self.is_active(layer, first + turns) else 0
        return (cycles * in_cycle + whole) * self.turn_steps + begun

    def steps_in_a_row(self, layer: int, steps: int, turn: int) -> int:
        """Return for how many steps in a row, up to the last of `steps`, the layer that `turn` trains was trained."""
        if self.num_active == self.num_layers:
            return steps
        first = turn
        while first > 0 and self.is_active(layer, first - 1):
            first -= 1
        return steps - first * self.turn_steps

    def _shift(self, turn: int) -> int:
        cycle, place = divmod(turn, self.num_shifts)
        return place if self.seed is None else _shuffled(f"{self.seed}/{cycle}", self.num_shifts)[place]


@lru_cache(maxsize=1024)
def _shuffled(seed: str, count: int) -> tuple[int, ...]:
    shifts = list(range(count))
    random.Random(seed).shuffle(shifts)
    return tuple(shifts)

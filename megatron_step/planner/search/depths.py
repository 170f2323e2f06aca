"""The depth after each stage, by dynamic programming.

A stage that grows the model from M to N layers costs c_i(M, N): the largest share of its memory that any pipeline rank
needs in the stage's best layout, or its time. The first stage begins with nothing, each other one with what the stage
before left, and the last one ends with all L layers:

    f_1(N) = c_1(0, N)      f_i(N) = min over M < N   f_(i-1)(M) o c_i(M, N)      o: max, or +

f_K(L) is the least cost of all stages: O(K L^2). planner/search/program.py has the same as an integer program.

Many costs are expensive to know. They are found only for the stages that the best path goes through, as long as their
bounds make it the best (logic-based Benders decomposition, Hooker and Ottosson, 2003).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
EXACT = 1e-9
"""Relative difference below which two costs are the same: they are computed in floating point."""


@dataclass(frozen=True)
class Depths:
    """Depths after each stage."""

    depths: tuple[int, ...]
    """N_1, ..., N_K; () if there are none."""
    cost: float
    """What they cost."""
    bound: float
    """No others cost less."""

    @property
    def is_optimal(self) -> bool:
        """Whether it is proven that none are better."""
        return bool(self.cost - self.bound <= EXACT * abs(self.cost))


def cheapest_depths(
    bounds: Sequence[Array],
    evaluate: Callable[[int, int, int], tuple[float, float]],
    *,
    largest: bool,
    start: Sequence[int] = (),
    deadline: float = float("inf"),
    rising: bool = False,
) -> Depths:
    """The depths that cost least: the `largest` cost of a stage, or the sum of all.

    `bounds` [i][M, N] is not above c_i(M, N), and infinite where there is no such stage. `evaluate` gives for i, M and
    N the cost of the best layout that it found and a bound of it, if `rising` also a bound for M and more than N. At
    the `deadline` (of time.monotonic) the best depths that are known by then are taken, `start` among them.
    """
    lower = [bound.copy() for bound in bounds]
    upper = [np.full_like(bound, np.nan) for bound in bounds]  # of what is not known yet, not a number
    path = tuple(start)
    while True:
        for i, growth in enumerate(growths(path)):
            if np.isnan(upper[i][growth]):
                upper[i][growth], proven = evaluate(i, *growth)
                bounded = (growth[0], slice(growth[1], None)) if rising else growth
                lower[i][bounded] = np.maximum(lower[i][bounded], proven)
        bound, path = best_depths(lower, largest=largest)
        is_known = not any(np.isnan(upper[i][growth]) for i, growth in enumerate(growths(path)))
        if is_known or monotonic() > deadline:
            known = [np.nan_to_num(cost, nan=np.inf, posinf=np.inf) for cost in upper]
            cost, best = best_depths(known, largest=largest)
            return Depths(best, cost, bound)


def best_depths(costs: Sequence[Array], *, largest: bool) -> tuple[float, tuple[int, ...]]:
    """The least cost of all stages and the depths N_1, ..., N_K = L after them; infinite and () if there is none.

    `costs` [i][M, N] is c_i(M, N), infinite where there is no such stage; a first stage has M = 0, no other has.
    Stages cost the `largest` of theirs, or their sum.
    """
    combine = np.maximum if largest else np.add
    best = costs[0][0]
    came_from = []
    for cost in costs[1:]:
        candidates = combine(best[1:, None], cost[1:])  # [M - 1, N]
        came_from.append(candidates.argmin(axis=0) + 1)
        best = candidates.min(axis=0)
    value = float(best[-1])
    if not np.isfinite(value):
        return float("inf"), ()
    depths = [len(best) - 1]
    for origins in reversed(came_from):
        depths.insert(0, int(origins[depths[0]]))
    return value, tuple(depths)


def growths(depths: Sequence[int]) -> list[tuple[int, int]]:
    """Layers before and after each stage."""
    return list(zip((0, *depths[:-1]), depths))

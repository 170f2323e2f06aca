"""Choose the depth after each stage by dynamic programming.

Stage i grows the model from M to N layers at the cost c_i(M, N). The cost is the largest share of memory that a
pipeline rank needs in the stage's best layout, or the stage's time. The first stage starts with no layer, each later
stage starts with the layers of the stage before, and the last stage ends with all L layers:

    f_1(N) = c_1(0, N)      f_i(N) = min over M < N   f_(i-1)(M) o c_i(M, N)      o: max, or +

f_K(L) is the least cost of all stages; it takes O(K L^2) time. planner/search/program.py states the same problem as an
integer program.

A cost takes long to compute, but a lower bound of the cost does not. The search finds the depths that are best by the
bounds and computes their costs. It repeats this until the costs of the best depths are all computed (logic-based
Benders decomposition, Hooker and Ottosson, 2003).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
EXACT = 1e-9
"""Relative difference up to which two costs count as equal, because of floating-point rounding."""


@dataclass(frozen=True)
class Depths:
    """Depths after each stage."""

    depths: tuple[int, ...]
    """Layers N_1, ..., N_K after each stage; () if no depths are possible."""
    cost: float
    """Cost of these depths."""
    bound: float
    """Lower bound of the cost of any depths."""

    @property
    def is_optimal(self) -> bool:
        """Whether no other depths can cost less."""
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
    """Find the depths with the least cost.

    The cost of all stages is the largest cost of a stage if `largest`, else the sum of the stages' costs.

    `bounds` [i][M, N] is a lower bound of c_i(M, N), infinite for an impossible stage. `evaluate` takes i, M and N. It
    returns the cost of the best layout found, and a lower bound of c_i(M, N). If `rising`, this bound also holds for
    c_i(M, Q) for all Q > N. At the `deadline` (a value of time.monotonic) the search ends with the best depths found.
    The search evaluates the depths `start` first.
    """
    lower = [bound.copy() for bound in bounds]
    upper = [np.full_like(bound, np.nan) for bound in bounds]  # NaN until computed
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
    """Return the least cost of all stages and the depths N_1, ..., N_K = L with this cost.

    The result is infinite and () if no depths are possible. `costs` [i][M, N] is c_i(M, N), infinite for an impossible
    stage. M is 0 in the first stage only. The cost of all stages is the largest cost of a stage if `largest`, else the
    sum of the stages' costs.
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
    """Return the numbers of layers before and after each stage."""
    return list(zip((0, *depths[:-1]), depths))

"""The depth after each stage by dynamic programming: the start and the bound of the integer program.

With c_i(M, N) what stage i costs if it grows the model from M to N layers,

    f_1(N) = c_1(0, N)      f_i(N) = min over M < N   f_(i-1)(M) o c_i(M, N)      o: max, or +

and f_K(L) is the least cost of all stages: O(K L^2).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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
    for before in reversed(came_from):
        depths.insert(0, int(before[depths[0]]))
    return value, tuple(depths)


def growths(depths: Sequence[int]) -> list[tuple[int, int]]:
    """Layers before and after each stage."""
    return list(zip((0, *depths[:-1]), depths))

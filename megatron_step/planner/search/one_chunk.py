"""Split a stage's layers over pipeline ranks without virtual pipelines, by dynamic programming.

Rank p costs w_p(x, y) with the layers x + 1, ..., y, and every rank has at least one layer. The recursion

    g_0(0) = 0      g_p(y) = min over x < y   max(g_(p-1)(x), w_p(x, y))

gives the cost g_P(N) of the best split. It is exact for any costs w, and takes O(P N^2) time.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def best_split(costs: Array) -> tuple[float, tuple[int, ...]]:
    """Return the cost of the costliest rank in the best split, and each rank's number of layers in this split.

    `costs` [p, x, y] is w_p(x, y), infinite for y <= x. The result is infinite and () if no split has a finite cost.
    """
    num_ranks, num_ends = costs.shape[:2]
    best = np.full(num_ends, np.inf)
    best[0] = -np.inf
    starts = np.zeros((num_ranks, num_ends), dtype=np.int64)  # x of the best split up to y
    for rank in range(num_ranks):
        candidates = np.maximum(best[:, None], costs[rank])
        starts[rank] = candidates.argmin(axis=0)
        best = candidates.min(axis=0)
    if not np.isfinite(best[-1]):
        return float("inf"), ()
    layout: list[int] = []
    end = num_ends - 1
    for rank in reversed(range(num_ranks)):
        start = int(starts[rank, end])
        layout.insert(0, end - start)
        end = start
    return float(best[-1]), tuple(layout)

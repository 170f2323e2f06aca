"""The best split of a stage's layers over pipeline ranks without virtual pipelines, by dynamic programming.

With w_p(x, y) what rank p costs with the layers x + 1, ..., y, and every rank at least one layer,

    g_0(0) = 0      g_p(y) = min over x < y   max(g_(p-1)(x), w_p(x, y))      the best split costs g_P(N)

which is exact: O(P N^2), for any w.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def best_split(costs: Array) -> tuple[float, tuple[int, ...]]:
    """The smallest largest cost of a rank, and the layers of each rank; infinite and () where nothing fits.

    `costs` [p, x, y] is w_p(x, y), infinite for y <= x.
    """
    num_ranks, num_ends = costs.shape[:2]
    best = np.full(num_ends, np.inf)
    best[0] = -np.inf
    starts = np.zeros((num_ranks, num_ends), dtype=np.int64)  # where the rank's layers begin in the best split up to y
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

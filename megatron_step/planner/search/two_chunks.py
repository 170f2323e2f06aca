"""Split a stage's layers over two virtual pipeline chunks on each rank, by dynamic programming.

The lower M layers are on the chunks 1, ..., P, and the upper N - M layers on the chunks P + 1, ..., 2 P. Rank p holds
chunk p and chunk P + p. W_c(s) is the cost of the lowest s layers on chunk c, and d_p the cost of rank p without
layers. If the lower chunks of the first p ranks end after y layers, the upper chunks of these ranks can end after at
most G_p(y) layers such that none of the ranks costs more than T. Beginning with G_0(0) = M,

    G_p(y) = max over x < y of   the largest z for which   d_p + W_p(y) - W_p(x) + W_(P+p)(z) - W_(P+p)(G_(p-1)(x)) <= T

All ranks stay within T if G_P(M) = N for some M. Taking the largest z is right because the chunks above then hold
fewer layers. But no chunk may be empty, so a chunk of one layer counts as the cheapest layer on that chunk. The least T
is therefore a lower bound of every split. It is also the cost of the split found, unless a chunk of one layer holds a
costlier layer than the one counted. For the same reason, inserting a layer anywhere never lowers the least T.

Bisection finds the least T over all M that can still improve it. For each M, a step of the bisection takes O(P M w)
time, with at most w layers in a lower chunk.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_step.planner.search.chunk_costs import ChunkCosts

Array = npt.NDArray[np.float64]
Ends = npt.NDArray[np.int64]


def two_chunk_split(costs: ChunkCosts, start: Sequence[int], precision: float) -> tuple[float, tuple[int, ...]]:
    """Return a lower bound of every split's cost, and the ends of all chunks in the best split found.

    The bound is below the least T by at most the fraction `precision` of the best cost found. `costs` must have two
    chunks on each rank. `start` are the ends of the chunks in a known split; the function returns them if it finds no
    better split.
    """
    highest, ends = float(costs.rank_costs(start).max()), tuple(start)
    middles = _middles(costs, highest)
    lowest, tried = 0.0, highest * (1 - precision)
    while highest - lowest > precision * highest:
        fitting, found = _within(costs, middles, tried)
        if len(fitting):
            middles, highest, ends = fitting, tried, found
        else:
            lowest = tried
        tried = (highest + lowest) / 2
    return lowest, ends


def _middles(costs: ChunkCosts, limit: float) -> Ends:
    """Return the numbers M of lower layers with which ranks may stay within `limit`.

    The test is necessary, not sufficient. It checks the lower chunks while each upper chunk has a single layer, and the
    upper chunks while each lower chunk has a single layer.
    """
    ranks, layers = costs.num_ranks, costs.num_layers
    lower, upper = np.zeros(1, dtype=np.int64), np.arange(layers + 1)
    for rank in range(ranks):
        budget = limit - costs.constants[:, rank, None]
        lower = _furthest(costs, rank, lower, budget - costs.cheapest[:, ranks + rank, None])
        lower = np.minimum(lower, layers - ranks - (ranks - 1 - rank))
        upper = _furthest(costs, ranks + rank, upper, budget - costs.cheapest[:, rank, None])
        upper = np.minimum(upper, layers - (ranks - 1 - rank))
    middles: Ends = np.arange(ranks, layers - ranks + 1)
    fitting: Ends = middles[(middles <= lower[0]) & (upper[middles] == layers)]
    return fitting


def _within(costs: ChunkCosts, middles: Ends, limit: float) -> tuple[Ends, tuple[int, ...]]:
    """Return the `middles` that let every rank stay within `limit`, and the ends of all chunks for the first of them.

    Both are empty if no M does.
    """
    ranks, layers, nothing = costs.num_ranks, costs.num_layers, (middles[:0], ())
    if len(middles) == 0:
        return nothing
    lower_ends = np.arange(middles.max() + 1)
    reached = [np.where(lower_ends == 0, middles[:, None], -1)]  # G, [m, y]; -1 where no such split exists
    begins: list[Ends] = []
    for rank in range(ranks):
        # w: no more layers fit into the lower chunk beside one layer in the upper chunk
        lower_budget = limit - costs.constants[:, rank] - costs.cheapest[:, ranks + rank]
        most_layers = (lower_budget / costs.cheapest[:, rank]).min()
        width = int(min(max(most_layers, 0), lower_ends[-1] - 1)) + 1
        begin = lower_ends[:, None] - np.arange(1, width + 1)  # x, [y, w]
        lower = costs.sums[:, rank, lower_ends][:, :, None] - costs.sums[:, rank][:, begin]  # [k, y, w]
        lower[:, :, 0] = costs.cheapest[:, rank, None]
        budget = limit - costs.constants[:, rank, None, None] - lower
        ends = _furthest(costs, ranks + rank, np.where(begin < 0, -1, reached[-1][:, begin]), budget)  # [m, y, w]
        begins.append(ends.argmax(axis=2))
        reached.append(np.minimum(ends.max(axis=2), layers - (ranks - 1 - rank)))  # leaves a layer for each chunk above
        if reached[-1].max() < 0:
            return nothing
    fits = reached[-1][np.arange(len(middles)), middles] == layers
    if not fits.any():
        return nothing
    first = int(fits.argmax())
    ends_of_lower = [int(middles[first])]
    for widths in reversed(begins[1:]):
        ends_of_lower.insert(0, ends_of_lower[0] - 1 - int(widths[first, ends_of_lower[0]]))
    return middles[fits], (*ends_of_lower, *(int(ends[first, end]) for ends, end in zip(reached[1:], ends_of_lower)))


def _furthest(costs: ChunkCosts, chunk: int, begins: Ends, budget: Array) -> Ends:
    """Return the highest ends of a chunk that begins at `begins`, has a layer or more and costs at most the budget.

    `budget` is [k, ...] for `begins` [...]. An end is -1 where no such chunk exists.
    """
    ends = np.full(begins.shape, costs.num_layers)
    fits = (begins >= 0) & (begins < costs.num_layers)
    for sums, cheapest, most in zip(costs.sums[:, chunk], costs.cheapest[:, chunk], budget):
        ends = np.minimum(ends, np.searchsorted(sums, sums[begins] + most, side="right") - 1)
        fits &= most >= cheapest
    return np.where(fits, np.maximum(ends, begins + 1), -1)

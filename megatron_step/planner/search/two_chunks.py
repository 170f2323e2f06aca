"""The split of a stage's layers over two virtual pipeline chunks on each rank, by dynamic programming.

Rank p holds chunk p, of the lower M layers, and chunk P + p, of the others. With W_c the sums of the layers' costs on
chunk c and d_p what rank p costs without layers, all ranks stay within T if for some M, beginning with G_0(0) = M,

    G_p(y) = max over x < y of   the largest z for which   d_p + W_p(y) - W_p(x) + W_(P+p)(z) - W_(P+p)(G_(p-1)(x)) <= T

reaches G_P(M) = N: the lower chunks of the first p ranks end after y layers, the upper ones as far up as they can.
Further up is better, since the chunks above can only lose layers by it, but that none is empty: a chunk of one layer is
counted as one of its cheapest. So the least T bounds every split, and is what its split costs unless the kind of a
single layer decides. For the same reason it does not fall if a layer is put in anywhere. It is searched by bisection,
for each M that can be better: O(P M w) a step, with at most w layers in a lower chunk.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_step.planner.search.chunk_costs import ChunkCosts

Array = npt.NDArray[np.float64]
Ends = npt.NDArray[np.int64]


def two_chunk_split(costs: ChunkCosts, start: Sequence[int], precision: float) -> tuple[float, tuple[int, ...]]:
    """A cost below which no split is, by a part `precision` below the least T, and the ends of chunks for that.

    `costs` are of two chunks on each rank; `start` are the ends of a split, which comes back if none is better.
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
    """Numbers M of lower layers with which ranks may stay within `limit`, either chunk alone but for a single layer."""
    ranks, layers = costs.num_ranks, costs.num_layers
    lower, upper = np.zeros(1, dtype=np.int64), np.arange(layers + 1)
    for rank in range(ranks):
        rest = limit - costs.constants[:, rank, None]
        lower = _furthest(costs, rank, lower, rest - costs.cheapest[:, ranks + rank, None])
        lower = np.minimum(lower, layers - ranks - (ranks - 1 - rank))
        upper = _furthest(costs, ranks + rank, upper, rest - costs.cheapest[:, rank, None])
        upper = np.minimum(upper, layers - (ranks - 1 - rank))
    middles: Ends = np.arange(ranks, layers - ranks + 1)
    fitting: Ends = middles[(middles <= lower[0]) & (upper[middles] == layers)]
    return fitting


def _within(costs: ChunkCosts, middles: Ends, limit: float) -> tuple[Ends, tuple[int, ...]]:
    """Return the `middles` with which every rank stays within `limit`, and ends of chunks for the first of these."""
    ranks, layers, none = costs.num_ranks, costs.num_layers, (middles[:0], ())
    if len(middles) == 0:
        return none
    every = np.arange(middles.max() + 1)
    reached = [np.where(every == 0, middles[:, None], -1)]  # G, [m, y]; -1 where there is no such split
    begins: list[Ends] = []
    for rank in range(ranks):
        left = limit - costs.constants[:, rank] - costs.cheapest[:, ranks + rank]
        most = (left / costs.cheapest[:, rank]).min()
        width = int(min(max(most, 0), every[-1] - 1)) + 1
        begin = every[:, None] - np.arange(1, width + 1)  # x, [y, w]
        lower = costs.sums[:, rank, every][:, :, None] - costs.sums[:, rank][:, begin]  # [k, y, w]
        lower[:, :, 0] = costs.cheapest[:, rank, None]
        rest = limit - costs.constants[:, rank, None, None] - lower
        ends = _furthest(costs, ranks + rank, np.where(begin < 0, -1, reached[-1][:, begin]), rest)  # [m, y, w]
        begins.append(ends.argmax(axis=2))
        reached.append(np.minimum(ends.max(axis=2), layers - (ranks - 1 - rank)))  # a layer for each chunk above
        if reached[-1].max() < 0:
            return none
    fits = reached[-1][np.arange(len(middles)), middles] == layers
    if not fits.any():
        return none
    first = int(fits.argmax())
    ends_of_lower = [int(middles[first])]
    for widths in reversed(begins[1:]):
        ends_of_lower.insert(0, ends_of_lower[0] - 1 - int(widths[first, ends_of_lower[0]]))
    return middles[fits], (*ends_of_lower, *(int(ends[first, end]) for ends, end in zip(reached[1:], ends_of_lower)))


def _furthest(costs: ChunkCosts, chunk: int, begins: Ends, rest: Array) -> Ends:
    """The last end of a chunk, at least a layer after `begins`, that costs no more than `rest` [k, ...]; -1 if none."""
    ends = np.full(begins.shape, costs.num_layers)
    fits = (begins >= 0) & (begins < costs.num_layers)
    for sums, cheapest, left in zip(costs.sums[:, chunk], costs.cheapest[:, chunk], rest):
        ends = np.minimum(ends, np.searchsorted(sums, sums[begins] + left, side="right") - 1)
        fits &= left >= cheapest
    return np.where(fits, np.maximum(ends, begins + 1), -1)

"""Split a stage's layers over virtual pipeline chunks by an integer program.

There are C = P V chunks. Chunk c is on rank c mod P and ends after s_c layers, with 0 = s_0 < s_1 < ... < s_C = N. The
binary variable Y_cs is 1 if s_c <= s. W_c(s) is the cost of the lowest s layers if all of them were on chunk c, so that

    W_c(s_c) = W_c(N) - sum over s < N of (W_c(s + 1) - W_c(s)) Y_cs

    minimise T    subject to    d_p + sum over c on p of (W_c(s_c) - W_c(s_(c-1))) <= T    for every rank p and kind
                                Y_cs <= Y_c(s+1),   Y_cs <= Y_(c-1)(s-1)

The constraints of the last line describe a staircase without empty chunks; by themselves they have integral corners.

With two chunks on each rank, dynamic programming (planner/search/two_chunks.py) supplies the starting split and a lower
bound. They are mostly equal, and then no program is solved. Large programs with two chunks are not solved either.
"""

from collections.abc import Sequence

import mip
import numpy as np
import numpy.typing as npt

from megatron_step.planner.search.chunk_costs import ChunkCosts, Split
from megatron_step.planner.search.depths import EXACT
from megatron_step.planner.search.solver import new_model
from megatron_step.planner.search.two_chunks import two_chunk_split

Limits = Sequence[tuple[ChunkCosts, float]]
"""Other costs, each with the limit that no rank may exceed."""


def near_split(costs: ChunkCosts, limits: Limits = (), start: Sequence[int] = (), precision: float = 1e-3) -> Split:
    """Return a good split, found by moving single layers between chunks, beginning with the layout `start` if given.

    Without `limits` and with two chunks on each rank, the split's bound is that of two_chunks.py, at the relative
    `precision`. In all other cases the bound is 0. The cost is infinite if no split within the limits was found.
    """
    ends = _improved(np.cumsum(start or _filled(costs)).tolist(), costs, limits)
    if limits or costs.sums.shape[1] != 2 * costs.num_ranks:
        return _split(ends, costs, 0.0) if _within(ends, limits) else Split(float("inf"), 0.0, ())
    bound, found = two_chunk_split(costs, ends, precision)
    return min((_split(candidate, costs, bound) for candidate in (ends, found)), key=lambda split: split.cost)


def _filled(costs: ChunkCosts) -> list[int]:
    """Return the layers of each chunk if layers of average cost go one by one to the rank that then costs least."""
    num_chunks, num_layers = costs.sums.shape[1], costs.num_layers
    average = costs.sums[:, :, -1].reshape(len(costs.sums), -1, costs.num_ranks) / num_layers  # [k, v, p]
    sizes = np.ones_like(average[0], dtype=np.int64)
    rank_sums = costs.constants + average.sum(axis=1)
    for _ in range(num_layers - num_chunks):
        v, rank = np.unravel_index((rank_sums[:, None] + average).max(axis=0).argmin(), sizes.shape)
        sizes[v, rank] += 1
        rank_sums[:, rank] += average[:, v, rank]
    return [int(size) for size in sizes.ravel()]


def interleaved_split(costs: ChunkCosts, seconds: float) -> Split:
    """Return the split whose costliest rank costs least.

    After `seconds`, return the best split found so far; its `bound` says how good it is proven to be.

    Raises SolverError if the program is needed but its solver cannot be loaded.
    """
    num_chunks, num_layers = costs.sums.shape[1], costs.num_layers
    near = near_split(costs, precision=EXACT / 2)
    # In large programs the solver does not improve on dynamic programming within minutes.
    is_large = num_chunks * num_layers > _LARGE and near.bound > 0
    if is_large or near.cost - near.bound <= EXACT * near.cost:
        return near
    unit = near.cost  # solvers compute best with numbers near 1
    model = new_model("the layout of virtual pipelines (stages.layouts: even does without)")
    model.max_mip_gap = model.max_mip_gap_abs = 0.0
    top = model.add_var(lb=near.bound / unit)
    ended = _staircase(model, num_chunks, num_layers)
    for sums, constants in zip(costs.sums, costs.constants):
        for rank, constant in enumerate(constants.tolist()):
            model += _rank_cost(sums, range(rank, num_chunks, costs.num_ranks), ended, constant) / unit <= top
    model.objective = mip.minimize(top)
    ends = np.cumsum(near.layout)
    model.start = [
        (variable, float(ends[c] <= s))
        for c, row in enumerate(ended)
        for s, variable in enumerate(row)
        if not isinstance(variable, int)
    ]
    model.optimize(max_seconds=seconds)
    bound = max(near.bound, _bound(model, unit))
    splits = [Split(near.cost, min(near.cost, bound), near.layout)]
    if model.num_solutions:
        found = [sum(_value(variable) < 0.5 for variable in row) for row in ended[:-1]]
        splits.append(_split(_improved([*found, num_layers], costs, ()), costs, bound))
    return min(splits, key=lambda split: split.cost)


_ROUNDING = 1e-9
_LARGE = 2000


def _split(ends: Sequence[int], costs: ChunkCosts, bound: float) -> Split:
    cost = float(costs.rank_costs(ends).max())
    return Split(cost, min(cost, bound), tuple(int(size) for size in np.diff([0, *ends])))


def _staircase(model: mip.Model, num_chunks: int, num_layers: int) -> list[list[mip.Var | int]]:
    """Return Y [c][s]: variables, or numbers where Y is known because each chunk below and above needs a layer."""
    ended: list[list[mip.Var | int]] = []
    for c in range(num_chunks):
        last = num_layers - (num_chunks - 1 - c)  # bounds of s_c
        first = c + 1 if c < num_chunks - 1 else last
        row = [
            int(s >= last) if not first <= s < last else model.add_var(var_type=mip.BINARY) for s in range(num_layers)
        ]
        ended.append(row)
    for c in range(num_chunks - 1):
        for s in range(num_layers):
            if s + 1 < num_layers:
                _add(model, ended[c][s], ended[c][s + 1])
            if c > 0 and s > 0:
                _add(model, ended[c][s], ended[c - 1][s - 1])
    return ended


def _add(model: mip.Model, smaller: mip.Var | int, larger: mip.Var | int) -> None:
    """Require smaller <= larger, unless the bounds already imply it."""
    if not isinstance(smaller, int) or not isinstance(larger, int):
        model += smaller - larger <= 0


def _rank_cost(
    sums: npt.NDArray[np.float64], chunks: Sequence[int], ended: list[list[mip.Var | int]], constant: float
) -> mip.LinExpr:
    """Return the cost of a rank: d_p, which is `constant`, plus the costs of the rank's `chunks`."""
    terms = []
    for c in chunks:
        # W_c(N) cancels in W_c(s_c) - W_c(s_(c-1)), except in the first chunk, where the second term is 0.
        constant += float(sums[c, -1]) if c == 0 else 0.0
        for s, step in enumerate(np.diff(sums[c]).tolist()):
            for chunk, sign in ((c, -step), (c - 1, step))[: 2 if c else 1]:
                variable = ended[chunk][s]
                if isinstance(variable, int):
                    constant += sign * variable
                else:
                    terms.append(sign * variable)
    return mip.xsum(terms) + constant


def _value(variable: mip.Var | int) -> float:
    return float(variable if isinstance(variable, int) else variable.x)


def _bound(model: mip.Model, unit: float) -> float:
    if model.status is mip.OptimizationStatus.OPTIMAL:
        return float(model.objective_value) * unit
    bound = model.objective_bound
    return float(bound) * unit if bound is not None and np.isfinite(bound) else 0.0


def _within(ends: Sequence[int], limits: Limits) -> bool:
    return all(float(other.rank_costs(ends).max()) <= limit * (1 + _ROUNDING) for other, limit in limits)


def _improved(ends: list[int], costs: ChunkCosts, limits: Limits) -> list[int]:
    """Move single layers from the costliest rank's chunks to others as long as it helps, and return the new ends."""

    def key(ends: Sequence[int]) -> tuple[float, list[float]]:
        excess = max([0.0, *(float((other.rank_costs(ends) / limit).max()) - 1 for other, limit in limits)])
        return excess if excess > _ROUNDING else 0.0, sorted(costs.rank_costs(ends).tolist(), reverse=True)

    best = key(ends)
    while True:
        moved = min(_handed_on(ends, costs), key=key, default=None)
        if moved is None or key(moved) >= best:
            return ends
        ends, best = moved, key(moved)


def _handed_on(ends: list[int], costs: ChunkCosts) -> list[list[int]]:
    """Return splits in which a chunk of the costliest rank has one layer less, and another chunk one more.

    The chunks between these two keep their number of layers but shift by one layer.
    """
    num_ranks, sizes = costs.num_ranks, np.diff([0, *ends])
    worst = int(costs.rank_costs(ends).argmax())
    splits = []
    for giver in range(worst, len(ends), num_ranks):
        for taker in range(len(ends)) if sizes[giver] > 1 else ():
            if taker > giver:
                splits.append([end - (giver <= c < taker) for c, end in enumerate(ends)])
            elif taker < giver:
                splits.append([end + (taker <= c < giver) for c, end in enumerate(ends)])
    return splits

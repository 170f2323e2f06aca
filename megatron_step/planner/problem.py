"""The integer program that chooses how many layers each stage adds (STEP, Yano et al., 2025, for any number of ranks).

A stage that grows the model from M to N layers costs c_i(M, N): the largest share of its memory that any pipeline rank
needs in the stage's best layout, or its time. With the binary z_iMN = [stage i grows from M to N layers],

    minimise T    or    sum over i of sum over M, N of c_i(M, N) z_iMN

    subject to    sum over M, N of c_i(M, N) z_iMN <= T                       for every stage i
                  sum over N of z_10N = 1                                     the first stage begins with nothing
                  sum over M of z_iMN = sum over Q of z_(i+1)NQ               each begins with what the one before left
                  sum over M of z_KML = 1                                     the last ends with all layers

On one rank, with bytes a of a layer that a stage adds, b of one that it found and c_i of the rest, c_i(M, N) is
a (N - M) + b M + c_i, and this is the paper's program: minimise max_i P_i over n_1, ..., n_K >= 1 that add up to L.

What makes it quick: dynamic programming over the depth reached (planner/depths.py) gives the optimum as start and
bound, and leaves out of the program what costs more. Costs that are expensive to know are found only for the stages
that the best path goes through, as long as their bounds make it the best (logic-based Benders decomposition, Hooker
and Ottosson, 2003).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import mip  # type: ignore[import-untyped]
import mip.cbc  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from megatron_step.planner.depths import best_depths, growths

Array = npt.NDArray[np.float64]
EXACT = 1e-9
"""Relative difference below which two costs are the same: solvers compute in floating point."""


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


def solve(
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
            return Depths(_solve_program(known, best, bound, cost, largest) if best else (), cost, bound)


def new_model() -> mip.Model:
    """An empty program for CBC, which says nothing."""
    # cffi makes a function at its first use, under a lock. That which a model calls at its end must be there before:
    # the garbage collector may end a model while the lock is held.
    _ = mip.cbc.cbclib.Cbc_deleteModel
    model = mip.Model(solver_name=mip.CBC)
    model.verbose = 0
    return model


def _solve_program(
    costs: Sequence[Array], start: tuple[int, ...], bound: float, limit: float, largest: bool
) -> tuple[int, ...]:
    """The program at the top of this file, where `start` costs `limit` and nothing costs less than `bound`."""
    unit = abs(limit) or 1.0  # solvers compute best with numbers near one
    model = new_model()
    total = model.add_var(lb=bound / unit, ub=limit / unit + EXACT)
    z = [_choices(model, cost, limit if largest else np.inf) for cost in costs]
    spent = [mip.xsum(cost[arc] / unit * chosen for arc, chosen in of.items()) for cost, of in zip(costs, z)]
    begins, ends = ([_sums(of, at) for of in z] for at in (0, 1))
    model += begins[0][0] == 1
    for i in range(len(costs) - 1):
        for depth in ends[i].keys() | begins[i + 1].keys():
            model += ends[i][depth] == begins[i + 1][depth]
    model += ends[-1][costs[0].shape[0] - 1] == 1
    for of_stage in spent if largest else [mip.xsum(spent)]:
        model += of_stage <= total + EXACT
    model.objective = mip.minimize(total)
    model.start = [(of[arc], 1.0) for of, arc in zip(z, growths(start))]
    status = model.optimize()
    if status is not mip.OptimizationStatus.OPTIMAL:
        raise RuntimeError(f"the solver did not find the layers of the stages: {status.name}")
    return tuple(next(arc[1] for arc, chosen in of.items() if chosen.x > 0.5) for of in z)


def _choices(model: mip.Model, cost: Array, limit: float) -> dict[tuple[int, int], mip.Var]:
    """z of a stage for all that it may cost."""
    arcs = np.argwhere(np.isfinite(cost) & (cost <= limit * (1 + EXACT)))
    return {(int(before), int(after)): model.add_var(var_type=mip.BINARY) for before, after in arcs}


def _sums(of: dict[tuple[int, int], mip.Var], at: int) -> dict[int, mip.LinExpr]:
    """Choices summed by the depth before (`at` 0) or after (1) the stage."""
    sums: dict[int, mip.LinExpr] = defaultdict(mip.LinExpr)
    for arc, chosen in of.items():
        sums[arc[at]] += chosen
    return sums

"""Choose how many layers each stage adds by an integer program, as the STEP paper does (Yano et al., 2025).

Stage i costs c_i(M, N) if it grows the model from M to N layers. The binary variable z_iMN is 1 if it does so:

    minimise T    or    sum over i of sum over M, N of c_i(M, N) z_iMN

    subject to    sum over M, N of c_i(M, N) z_iMN <= T                       for every stage i
                  sum over N of z_10N = 1                                     the first stage starts with no layer
                  sum over M of z_iMN = sum over Q of z_(i+1)NQ               each starts where the one before ended
                  sum over M of z_KML = 1                                     the last ends with all L layers

On one rank, let a new layer need a bytes, an old layer b bytes, and the rest of stage i c_i bytes. Then c_i(M, N) is
a (N - M) + b M + c_i, and this is the paper's program: minimise max_i P_i over n_1, ..., n_K >= 1 that add up to L.

A run's plan takes the same optimum from dynamic programming (planner/search/depths.py), which needs no solver.
"""

from collections import defaultdict
from collections.abc import Sequence

import mip
import numpy as np
import numpy.typing as npt

from megatron_step.planner.search.solver import new_model

Array = npt.NDArray[np.float64]


def solve_program(costs: Sequence[Array], *, largest: bool, limit: float = np.inf) -> tuple[int, ...]:
    """Return the depths N_1, ..., N_K = L after the stages, by the program at the top of this file.

    `costs` [i][M, N] is c_i(M, N), infinite for an impossible stage. The program minimises the largest cost of a stage
    if `largest`, else the sum of the stages' costs. It allows no stage that costs more than `limit`.

    Raises RuntimeError if the program has no solution, and SolverError if its solver cannot be loaded.
    """
    unit = float(max(cost[np.isfinite(cost)].max(initial=0.0) for cost in costs)) or 1.0  # solvers like numbers near 1
    model = new_model("the paper's program")
    model.max_mip_gap = model.max_mip_gap_abs = 0.0
    total = model.add_var()
    z = [_choices(model, cost, limit) for cost in costs]
    spent = [mip.xsum(cost[arc] / unit * chosen for arc, chosen in choices.items()) for cost, choices in zip(costs, z)]
    begins, ends = ([_sums(choices, side) for choices in z] for side in (0, 1))
    model += begins[0][0] == 1
    for i in range(len(costs) - 1):
        for depth in ends[i].keys() | begins[i + 1].keys():
            model += ends[i][depth] == begins[i + 1][depth]
    model += ends[-1][costs[0].shape[0] - 1] == 1
    for stage_cost in spent if largest else [mip.xsum(spent)]:
        model += stage_cost <= total
    model.objective = mip.minimize(total)
    status = model.optimize()
    if status is not mip.OptimizationStatus.OPTIMAL:
        raise RuntimeError(f"the solver did not find the layers of the stages: {status.name}")
    return tuple(next(arc[1] for arc, chosen in choices.items() if chosen.x > 0.5) for choices in z)


def _choices(model: mip.Model, cost: Array, limit: float) -> dict[tuple[int, int], mip.Var]:
    """Add a stage's variables z to the model, and return them by (M, N) for each growth that is possible in `limit`."""
    arcs = np.argwhere(np.isfinite(cost) & (cost <= limit))
    return {(int(old_depth), int(new_depth)): model.add_var(var_type=mip.BINARY) for old_depth, new_depth in arcs}


def _sums(choices: dict[tuple[int, int], mip.Var], side: int) -> dict[int, mip.LinExpr]:
    """Return the sums of a stage's variables by the depth before the stage (`side` 0) or after it (`side` 1)."""
    sums: dict[int, mip.LinExpr] = defaultdict(mip.LinExpr)
    for arc, chosen in choices.items():
        sums[arc[side]] += chosen
    return sums

"""Chooses the layers that each stage adds and their pipeline layouts, by the objective of the config.

memory              the least share of a rank's memory in any stage; of such plans the one that is deep early
time                the least time of all steps, with no rank's memory exceeded
memory_then_time    the least share; of such plans the fastest

Whatever the objective, each stage's layout is the fastest one within the share that the plan needs anyway.
A stage of no steps is never built: it costs nothing, and its layout does not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig
from megatron_step.plan.layout import num_chunks
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.operators import operator_of
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Solution
from megatron_step.planner.costs.machines import Machine
from megatron_step.planner.costs.stage_costs import RunCosts
from megatron_step.planner.search.chunk_costs import Split
from megatron_step.planner.search.depths import EXACT, Depths, best_depths, cheapest_depths, growths
from megatron_step.planner.search.stage_layouts import StageLayouts

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What the planner chose."""

    depths: tuple[int, ...]
    """Layers of the model in each stage."""
    layouts: tuple[tuple[int, ...], ...]
    """Layers of each chunk of the pipeline in each stage."""
    solution: Solution
    """How good it is proven to be."""


def choose(
    resolved: ResolvedConfig,
    costs: RunCosts,
    machines: Sequence[Machine],
    steps: Sequence[int],
    depths: Sequence[int] | None,
) -> Choice:
    """The depth and layout of each stage, of `steps` optimizer steps each; `depths` where they are known.

    Where an old layer costs as much as a new one, no depths save memory: then each stage adds fewer layers than the one
    before.

    Raises ValueError if there are too few layers, or if no choice of layers fits the machines.
    """
    config = resolved.config
    planner, count = config.planner, config.stages.count
    # Three quarters of the time for looking around among stages, the rest for the layouts of those that are chosen; the
    # solver looks at its clock but now and then.
    layouts = StageLayouts(resolved, costs, machines, seconds=planner.time_limit / (4 * count))
    deadline = monotonic() + planner.time_limit * 3 / 4
    if depths is None and count > 1 and not layouts.old_layers_save:
        depths = _decreasing(config)
    stages = _Stages(layouts, steps, [_possible(stage, config, depths) for stage in range(count)])
    if planner.objective == "time":
        best = _fastest(stages, 1.0, (), deadline)
        _check_found(best, stages, config)
        found = stages.splits(best.depths, layouts.least_share)
        return _choice(stages, best.depths, found, 1.0, _solution(best, "time", config))
    least = _least_share(stages, deadline)
    _check_found(least, stages, config)
    if planner.objective == "memory":
        best = _deepest(stages, least.cost, least.depths, deadline)
    else:
        best = _fastest(stages, least.cost, least.depths, deadline)
    found = stages.splits(best.depths, partial(layouts.least_share, thorough=True))
    proven = Depths(best.depths, max(split.cost for split in found), least.bound)
    return _choice(stages, best.depths, found, proven.cost, _solution(proven, "memory", config))


@dataclass(frozen=True)
class _Stages:
    """The stages that depths are sought for."""

    layouts: StageLayouts
    """The best layouts of any stage that takes steps."""
    steps: Sequence[int]
    """Optimizer steps of each stage."""
    possible: Sequence[npt.NDArray[np.bool_]]
    """For each stage [old_depth, new_depth]: whether it may grow the model so."""

    def bounds(self, bounds: Array, fits: npt.NDArray[np.bool_] | bool = True) -> list[Array]:
        """Return for each stage `bounds` [old_depth, new_depth] where that is possible and fits, and 0 for no steps."""
        return [
            np.where(possible & fits, bounds, np.inf) if steps else np.where(possible, 0.0, np.inf)
            for possible, steps in zip(self.possible, self.steps)
        ]

    def splits(self, depths: Sequence[int], best: Callable[[int, int], Split]) -> list[Split]:
        """The `best` layout of each stage."""
        found = []
        for (old_depth, new_depth), steps in zip(growths(depths), self.steps):
            found.append(best(old_depth, new_depth) if steps else Split(0.0, 0.0, self.layouts.even(new_depth)))
        return found


def _solution(found: Depths, kind: Literal["memory", "time"], config: RunConfig) -> Solution:
    """Return how good the depths are. Where old layers differ, their mean costs prove nothing: the bound is 0."""
    if config.stages.count > 1 and policy_of(config).period > 1:
        return Solution("feasible", kind, found.cost, 0.0)
    return Solution("optimal" if found.is_optimal else "feasible", kind, found.cost, found.bound)


def _choice(stages: _Stages, depths: Sequence[int], found: Sequence[Split], limit: float, solution: Solution) -> Choice:
    """The plan of these depths, with the fastest layouts within `limit`; `found` are layouts that are."""
    start = dict(zip(growths(depths), found))
    fastest = stages.splits(depths, lambda *growth: stages.layouts.fastest(*growth, limit, start[growth].layout))
    return Choice(tuple(depths), tuple(split.layout for split in fastest), solution)


def _least_share(stages: _Stages, deadline: float) -> Depths:
    """The depths of the least largest share."""
    layouts = stages.layouts

    def evaluate(stage: int, old_depth: int, new_depth: int) -> tuple[float, float]:
        if stages.steps[stage] == 0:
            return 0.0, 0.0
        split = layouts.least_share(old_depth, new_depth)
        return split.cost, split.bound

    bounds = stages.bounds(layouts.share_bounds())
    return cheapest_depths(bounds, evaluate, largest=True, deadline=deadline, rising=layouts.bounds_rise)


def _possible(stage: int, config: RunConfig, depths: Sequence[int] | None) -> npt.NDArray[np.bool_]:
    """[old_depth, new_depth]: whether the stage may grow the model so."""
    num_layers, operator = config.model.num_layers, operator_of(config.growth)
    allowed = np.zeros((num_layers + 1, num_layers + 1), dtype=bool)
    if depths is not None:
        allowed[growths(depths)[stage]] = True
        return allowed
    for old_depth in [0] if stage == 0 else range(1, num_layers + 1):
        for new_depth in range(old_depth + 1, num_layers + 1):
            allowed[old_depth, new_depth] = old_depth == 0 or operator.can_add(old_depth, new_depth - old_depth)
    return allowed


def _deepest(stages: _Stages, limit: float, start: Sequence[int], deadline: float) -> Depths:
    """Find the depths within `limit` with the largest sum."""
    layouts = stages.layouts
    fits = layouts.share_bounds() <= limit * (1 + EXACT)
    num_layers = fits.shape[0] - 1
    missing = np.broadcast_to(num_layers - np.arange(num_layers + 1.0), fits.shape)

    def evaluate(stage: int, old_depth: int, new_depth: int) -> tuple[float, float]:
        if stages.steps[stage] == 0:
            return 0.0, 0.0
        share = layouts.least_share(old_depth, new_depth).cost
        cost = float(num_layers - new_depth) if share <= limit * (1 + EXACT) else np.inf
        return cost, cost

    return cheapest_depths(stages.bounds(missing, fits), evaluate, largest=False, start=start, deadline=deadline)


def _fastest(stages: _Stages, limit: float, start: Sequence[int], deadline: float) -> Depths:
    """Find the depths within `limit` whose steps take the least time."""
    layouts = stages.layouts
    fits = layouts.share_bounds() <= limit * (1 + EXACT)
    step_seconds = stages.bounds(layouts.seconds_bounds(), fits)
    bounds = [seconds * max(steps, 1) for seconds, steps in zip(step_seconds, stages.steps)]

    def evaluate(stage: int, old_depth: int, new_depth: int) -> tuple[float, float]:
        steps = stages.steps[stage]
        if steps == 0:
            return 0.0, 0.0
        split = layouts.fastest(old_depth, new_depth, limit)
        return steps * split.cost, steps * split.bound

    return cheapest_depths(bounds, evaluate, largest=False, start=start, deadline=deadline)


def _decreasing(config: RunConfig) -> tuple[int, ...] | None:
    """Return the possible depths that are nearest to those of new layers in the ratio K + 1 : K : ... : 2 of K stages.

    None if the model cannot grow to all its layers.
    """
    count, num_layers = config.stages.count, config.model.num_layers
    ends = np.cumsum(np.arange(count + 1, 1, -1.0))
    wanted = num_layers * ends / ends[-1]
    depths = np.arange(num_layers + 1.0)
    enough = depths >= num_chunks(config.parallel)
    costs = [
        np.where(_possible(stage, config, None) & enough, np.abs(depths - wanted[stage]), np.inf)
        for stage in range(count)
    ]
    return best_depths(costs, largest=False)[1] or None


def _check_found(found: Depths, stages: _Stages, config: RunConfig) -> None:
    if found.depths:
        return
    chunks = num_chunks(config.parallel)
    count, num_layers = config.stages.count, config.model.num_layers
    if num_layers < chunks + count - 1:
        raise ValueError(
            f"{counted(num_layers, 'layer')} cannot be split into {counted(count, 'stage')} on "
            f"{counted(chunks, 'pipeline chunk')}: the first stage needs a layer for each chunk, and each later stage "
            f"adds at least one. Set model.num_layers to at least {chunks + count - 1}, or use fewer stages or "
            "pipeline ranks"
        )
    _, path = best_depths([np.where(possible, 0.0, np.inf) for possible in stages.possible], largest=True)
    if not path:
        operator = operator_of(config.growth)
        raise ValueError(
            f"growth.operator {operator.name} adds {operator.adds}: it cannot grow a model to "
            f"{counted(num_layers, 'layer')} in {counted(count, 'stage')}. Change stages.count or model.num_layers"
        )
    raise ValueError(
        "the planner found no plan that fits the memory of the cluster within planner.time_limit "
        f"{config.planner.time_limit:g} s. Run megatron-step plan --explain to see the missing memory, and changes "
        "that make a plan fit"
    )

"""Make the plan of a run from its config; the planner chooses the layers and layouts that the config leaves open."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron_step.config.cluster import Cluster
from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig, batch_size_at
from megatron_step.plan.layout import num_chunks
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.operators import GrownLayer, first_layers, grow, operator_of
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage, StagePlan, even_layout, first_steps
from megatron_step.planner.costs.machines import Machine, pipeline_machines
from megatron_step.planner.costs.stage_costs import RunCosts, run_costs
from megatron_step.planner.search.choose import choose


def make_plan(
    resolved: ResolvedConfig, chosen: Sequence[int] | None = None, *, cluster: Cluster | None = None
) -> StagePlan:
    """Return the stages of a run on the machines of `cluster`.

    `chosen` has the layers that each stage adds, if an earlier plan chose them.

    Raises ValueError as `check_growth`, `pipeline_machines` and `plan_by_costs` do.
    """
    check_growth(resolved.config)
    machines = pipeline_machines(cluster, resolved.config.parallel, resolved.dp_size)
    return plan_by_costs(resolved, run_costs(resolved), machines, chosen)


def check_growth(config: RunConfig) -> None:
    """Raise ValueError if there is no such growth operator or policy for old layers, or if other keys contradict it."""
    operator_of(config.growth)
    policy_of(config).check(config)


def plan_by_costs(
    resolved: ResolvedConfig, costs: RunCosts, machines: Sequence[Machine], chosen: Sequence[int] | None = None
) -> StagePlan:
    """Return the stages of a run with these `costs` on these `machines`; `chosen` as in `make_plan`.

    Raises ValueError if the growth operator cannot add the layers asked for, if a layout does not hold a stage, or if
    the plan does not fit the machines.
    """
    config = resolved.config
    budgets = _step_budgets(config)
    spans = first_steps(budgets, config.stages.growth_times)
    depths = _given_depths(config, chosen)
    steps = [last - first for first, last in spans]
    layouts = _given_layouts(config, depths, steps)
    solution = None
    if depths is None or layouts is None:
        choice = choose(resolved, costs, machines, steps, depths)
        depths, layouts, solution = choice.depths, choice.layouts, choice.solution
    stages: list[Stage] = []
    for index, (first_step, last_step) in enumerate(spans):
        layers = _layers(stages, depths[index] - (depths[index - 1] if index else 0), config)
        stages.append(
            Stage(
                index=index,
                layers=layers,
                first_step=first_step,
                last_step=last_step,
                schedule_steps=budgets[index],
                grows=index < config.stages.count - 1,
                layout=layouts[index],
            )
        )
    return StagePlan(tuple(stages), solution)


def _given_depths(config: RunConfig, chosen: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the layers in each stage; None if the planner must choose them.

    Raises ValueError if stages.layouts, given without stages.layers, do not grow to the whole model.
    """
    stages, num_layers = config.stages, config.model.num_layers
    if stages.layers != "auto":
        return tuple(accumulate(stages.layers))
    if stages.count == 1:
        return (num_layers,)
    if isinstance(stages.layouts, list):
        depths = tuple(sum(layout) for layout in stages.layouts)
        if depths[-1] != num_layers or list(depths) != sorted(depths):
            raise ValueError(
                f"stages.layouts give the stages {list(depths)} layers, but these must grow to model.num_layers "
                f"{num_layers}: correct the layouts"
            )
        return depths
    return None if chosen is None else tuple(accumulate(chosen))


def _given_layouts(
    config: RunConfig, depths: tuple[int, ...] | None, steps: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """Return the layout of each stage; None if the planner must choose it. `steps` has each stage's optimizer steps.

    Raises ValueError if a chunk of the pipeline gets no layer, or if a layout does not fit its stage.
    """
    if depths is None:
        return None
    chunks = num_chunks(config.parallel)
    for number, (depth, num_steps) in enumerate(zip(depths, steps), start=1):
        if depth < chunks and num_steps > 0:
            raise ValueError(
                f"stage {number} has {counted(depth, 'layer')} for parallel.pipeline_parallel_size "
                f"{config.parallel.pipeline_parallel_size} x parallel.virtual_pipeline_size "
                f"{config.parallel.virtual_pipeline_size}: every pipeline chunk needs a layer. Give the stage more "
                "layers, or use fewer pipeline ranks"
            )
    layouts = config.stages.layouts
    if chunks == 1 or layouts == "even":
        return tuple(even_layout(depth, chunks) for depth in depths)
    if layouts == "auto":
        return None
    for number, (layout, depth, num_steps) in enumerate(zip(layouts, depths, steps), start=1):
        if len(layout) != chunks or sum(layout) != depth or min(layout) < min(num_steps, 1):
            raise ValueError(
                f"stages.layouts: {layout} of stage {number} must be {counted(chunks, 'number')}, each at least 1, "
                f"that add up to its {counted(depth, 'layer')}"
            )
    return tuple(tuple(layout) for layout in layouts)


def _layers(stages: list[Stage], num_new: int, config: RunConfig) -> tuple[GrownLayer, ...]:
    if not stages:
        return first_layers(num_new, config.stages.start_from is not None)
    return grow(stages[-1].layers, num_new, len(stages), config.growth, config.training.seed)


def _step_budgets(config: RunConfig) -> list[int]:
    """Return the steps that each stage's learning-rate schedule spans, with schedule.scope `stage`."""
    stages = config.stages
    if stages.run_shares is not None:
        return _divided(stages.run_shares, _run_steps(config))
    if stages.tokens is None:
        assert stages.steps is not None
        return stages.steps if isinstance(stages.steps, list) else [stages.steps] * stages.count
    tokens = stages.tokens if isinstance(stages.tokens, list) else [stages.tokens] * stages.count
    budgets: list[int] = []
    consumed = 0  # samples before the stage; a ramp-up makes the batches of later steps larger
    for index, budget in enumerate(tokens):
        budgets.append(_steps_of(math.ceil(budget / config.model.seq_length), consumed, config))
        for _ in range(*first_steps(budgets, stages.growth_times)[index]):
            consumed += batch_size_at(config.training, consumed)
    return budgets


def _run_steps(config: RunConfig) -> int:
    """Return the steps of a run whose stages are shares of it."""
    steps, tokens = config.stages.steps, config.stages.tokens
    assert not isinstance(steps, list) and not isinstance(tokens, list)
    if steps is not None:
        return steps
    assert tokens is not None
    return _steps_of(math.ceil(tokens / config.model.seq_length), 0, config)


def _divided(shares: Sequence[float], steps: int) -> list[int]:
    """Return `steps` divided by `shares`.

    Raises ValueError if a stage with a share gets no step.
    """
    ends = [round(share * steps) for share in accumulate(shares)]
    divided = [end - start for start, end in pairwise([0, *ends])]
    for number, (share, stage_steps) in enumerate(zip(shares, divided), start=1):
        if share and not stage_steps:
            raise ValueError(
                f"stages.shares gives stage {number} {share:g} of {counted(steps, 'step')}, less than one step: train "
                "more steps, or give the stage a larger share"
            )
    return divided


def _steps_of(samples: int, consumed: int, config: RunConfig) -> int:
    """Return the number of steps that consume at least `samples` samples after the first `consumed` samples."""
    steps, end = 0, consumed + samples
    while consumed < end:
        if consumed >= (config.training.ramp_up.samples if config.training.ramp_up else 0):
            return steps + math.ceil((end - consumed) / config.training.global_batch_size)
        consumed += batch_size_at(config.training, consumed)
        steps += 1
    return steps

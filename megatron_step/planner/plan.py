"""Makes the plan of a run from its config: arithmetic, and the integer program where it is to choose the layers."""

import math
from collections.abc import Sequence
from itertools import accumulate

from megatron_step.config.cluster import Cluster
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

    `chosen` are the layers that each stage adds, where an earlier plan has chosen them.

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
    spans = first_steps(budgets, config.stages.grow_at)
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
    """Layers in each stage, where they are not for the planner to choose.

    Raises ValueError if layouts without layers do not grow to the whole model.
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
                f"stages.layouts hold {list(depths)} layers in their stages, which do not grow to model.num_layers "
                f"{num_layers}"
            )
        return depths
    return None if chosen is None else tuple(accumulate(chosen))


def _given_layouts(
    config: RunConfig, depths: tuple[int, ...] | None, steps: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """The layout of each stage, of `steps` optimizer steps each, where it is not for the planner to choose.

    Raises ValueError if a part of the pipeline gets no layer, or a layout does not hold its stage.
    """
    if depths is None:
        return None
    chunks = num_chunks(config.parallel)
    for number, (depth, num_steps) in enumerate(zip(depths, steps), start=1):
        if depth < chunks and num_steps > 0:
            raise ValueError(
                f"stage {number} has {depth} layers for parallel.pipeline_parallel_size "
                f"{config.parallel.pipeline_parallel_size} x parallel.virtual_pipeline_size "
                f"{config.parallel.virtual_pipeline_size}: every chunk of the pipeline needs a layer"
            )
    layouts = config.stages.layouts
    if chunks == 1 or layouts == "even":
        return tuple(even_layout(depth, chunks) for depth in depths)
    if layouts == "auto":
        return None
    for number, (layout, depth, num_steps) in enumerate(zip(layouts, depths, steps), start=1):
        if len(layout) != chunks or sum(layout) != depth or min(layout) < min(num_steps, 1):
            raise ValueError(
                f"stages.layouts: {layout} of stage {number} must be {chunks} numbers, each at least 1, that add up to "
                f"its {depth} layers"
            )
    return tuple(tuple(layout) for layout in layouts)


def _layers(stages: list[Stage], num_new: int, config: RunConfig) -> tuple[GrownLayer, ...]:
    if not stages:
        return first_layers(num_new, config.stages.start_from is not None)
    return grow(stages[-1].layers, num_new, len(stages), config.growth, config.training.seed)


def _step_budgets(config: RunConfig) -> list[int]:
    """Steps that each stage's schedule is laid out for."""
    stages = config.stages
    if stages.tokens is None:
        assert stages.steps is not None
        return stages.steps if isinstance(stages.steps, list) else [stages.steps] * stages.count
    tokens = stages.tokens if isinstance(stages.tokens, list) else [stages.tokens] * stages.count
    budgets: list[int] = []
    consumed = 0  # samples before the stage: a ramp-up of the batch makes later steps larger
    for index, budget in enumerate(tokens):
        budgets.append(_steps_of(math.ceil(budget / config.model.seq_length), consumed, config))
        for _ in range(*first_steps(budgets + [1] * (stages.count - index - 1), stages.grow_at)[index]):
            consumed += batch_size_at(config.training, consumed)
    return budgets


def _steps_of(samples: int, consumed: int, config: RunConfig) -> int:
    """Steps that take `samples` samples, or a little more, after `consumed` ones."""
    steps, end = 0, consumed + samples
    while consumed < end:
        if consumed >= (config.training.ramp_up.samples if config.training.ramp_up else 0):
            return steps + math.ceil((end - consumed) / config.training.global_batch_size)
        consumed += batch_size_at(config.training, consumed)
        steps += 1
    return steps

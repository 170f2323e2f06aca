"""Makes the plan of a run from its config: arithmetic, and the integer program where it is to choose the layers."""

import math
from collections.abc import Sequence

from megatron_step.config.run import RunConfig, batch_size_at
from megatron_step.planner.operators import GrownLayer, first_layers, grow
from megatron_step.planner.problem import choose_layers
from megatron_step.planner.stages import Stage, StagePlan, even_layout, first_steps


def make_plan(config: RunConfig, vocab_size: int, chosen: Sequence[int] | None = None) -> StagePlan:
    """The stages of a run. `chosen` are the layers that each stage adds where a plan made before has chosen them.

    Raises ValueError if the growth operator cannot add the layers asked for, or a layout does not hold a stage.
    """
    new_layers = _new_layers(config, vocab_size, chosen)
    budgets = _step_budgets(config)
    stages: list[Stage] = []
    for index, (first_step, last_step) in enumerate(first_steps(budgets, config.stages.grow_at)):
        layers = _layers(stages, new_layers[index], config)
        stages.append(
            Stage(
                index=index,
                layers=layers,
                first_step=first_step,
                last_step=last_step,
                schedule_steps=budgets[index],
                grows=index < config.stages.count - 1,
                layout=_layout(config, index, len(layers)),
            )
        )
    return StagePlan(tuple(stages))


def _new_layers(config: RunConfig, vocab_size: int, chosen: Sequence[int] | None) -> Sequence[int]:
    if config.stages.layers != "auto":
        return config.stages.layers
    return choose_layers(config, vocab_size) if chosen is None else chosen


def _layers(before: list[Stage], num_new: int, config: RunConfig) -> tuple[GrownLayer, ...]:
    if not before:
        return first_layers(num_new, config.stages.start_from is not None)
    return grow(before[-1].layers, num_new, len(before), config.growth, config.training.seed)


def _layout(config: RunConfig, index: int, num_layers: int) -> tuple[int, ...]:
    pipeline, virtual = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_size
    chunks = pipeline * virtual
    if num_layers < chunks:
        raise ValueError(
            f"stage {index} has {num_layers} layers for parallel.pipeline_parallel_size {pipeline} x "
            f"parallel.virtual_pipeline_size {virtual}: every part of the pipeline needs a layer"
        )
    if config.stages.layouts is None:
        return even_layout(num_layers, chunks)
    layout = config.stages.layouts[index]
    if len(layout) != chunks or sum(layout) != num_layers or min(layout) < 1:
        raise ValueError(
            f"stages.layouts: {layout} of stage {index} must be {chunks} numbers, each at least 1, that add up to its "
            f"{num_layers} layers"
        )
    return tuple(layout)


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

"""The Pareto front of a model's plans over numbers of stages, adapter ranks, layouts, recompute and model states.

A plan is on the front unless another plan needs less memory and is as fast, or is faster with as little memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from megatron_step.config.cluster import Cluster
from megatron_step.config.optimization import OptimizerConfig, StatesRecipe
from megatron_step.config.run import check_world
from megatron_step.plan.old_layers import adapts
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.states import BF16
from megatron_step.planner.forecast import Forecast, forecast
from megatron_step.report.text_table import aligned, format_bytes

COUNTS = (1, 2, 3, 4, 6)
"""Numbers of stages to try."""
RANKS = (16, 64, 128)
"""Adapter ranks to try."""

STATES: tuple[StatesRecipe, ...] = ("full", "compact")
"""Values of optimizer.states to try for bf16 weights."""
RECOMPUTES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
"""Values of parallel.recompute to try."""


@dataclass(frozen=True)
class Candidate:
    """A config and the forecast of its plan."""

    resolved: ResolvedConfig
    """The config and its sizes."""
    forecast: Forecast
    """The plan, with its bytes and seconds."""

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step over the run."""
        return self.forecast.seconds / self.forecast.plan.num_steps


def variants(resolved: ResolvedConfig, cluster: Cluster) -> Iterator[ResolvedConfig]:
    """Yield every config that the sweep tries: those that can run on as many ranks as `resolved` has."""
    config, world_size = resolved.config, resolved.world_size
    largest = min(group.gpus_per_node for group in cluster.nodes)
    tensor_sizes = [size for size in _powers(largest) if largest % size == 0]
    pipelines = [size for size in _powers(world_size) if size <= config.model.num_layers]
    recipes: list[StatesRecipe] = [config.optimizer.states]
    if resolved.recipe.weight == BF16 and config.planner.recipe is None:
        recipes = sorted({*STATES, config.optimizer.states})
    axes = product(COUNTS, RANKS, tensor_sizes, pipelines, RECOMPUTES, recipes)
    for count, rank, tensor, pipeline, recompute, states in axes:
        if count == 1 and rank != RANKS[0]:
            continue  # a model that does not grow has no adapters
        try:
            changed = replace(
                config,
                stages=config.stages.with_count(count),
                adapter=replace(config.adapter, rank=rank),
                optimizer=_with_states(config.optimizer, states),
                parallel=replace(
                    config.parallel,
                    tensor_parallel_size=tensor,
                    pipeline_parallel_size=pipeline,
                    virtual_pipeline_size=1,
                    sequence_parallel=tensor > 1,
                    recompute=recompute,
                ),
                planner=replace(config.planner, objective="memory_then_time"),
            )
            check_world(changed, world_size)
        except ValueError:
            continue
        yield resolved.with_config(changed)


def _with_states(optimizer: OptimizerConfig, states: StatesRecipe) -> OptimizerConfig:
    """Return the section with another recipe; keys that shape a recipe stay with their own."""
    if states == optimizer.states:
        return optimizer
    return replace(optimizer, states=states, gradients=None, correction_bits=16, momentum_bits=8)


def candidate(variant: ResolvedConfig, cluster: Cluster) -> Candidate | None:
    """Return the plan of a variant; None if there is none."""
    try:
        return Candidate(variant, forecast(variant, cluster))
    except ValueError:
        return None


def pareto_front(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates on the Pareto front of peak memory and time, ordered by memory."""
    front: list[Candidate] = []
    for item in sorted(candidates, key=lambda item: (item.forecast.peak_bytes, item.step_seconds)):
        if not front or item.step_seconds < front[-1].step_seconds:
            front.append(item)
    return front


def front_table(front: list[Candidate]) -> str:
    """Return a table with a line for each plan."""
    rows = [("peak", "fits", "s/step", "stages", "layers", "adapter rank", "TP", "PP", "DP", "recompute", "states")]
    for item in front:
        config, plan = item.resolved.config, item.forecast.plan
        parallel = config.parallel
        rows.append(
            (
                format_bytes(item.forecast.peak_bytes),
                "no" if item.forecast.status == "infeasible" else "yes",
                f"{item.step_seconds:.3g}",
                str(len(plan.stages)),
                "+".join(str(stage.num_new_layers) for stage in plan.stages),
                str(config.adapter.rank) if adapts(config) else "-",
                str(parallel.tensor_parallel_size),
                str(parallel.pipeline_parallel_size),
                str(item.resolved.dp_size),
                parallel.recompute,
                config.optimizer.states,
            )
        )
    return aligned(rows)


def plot(candidates: list[Candidate], front: list[Candidate], path: Path, marks: dict[str, float]) -> None:
    """Plot memory over time of all candidates and the front, as a PNG; `marks` are lines to draw, in bytes by label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of a step, on average over the run", ylabel="peak memory of a GPU, GiB")
    for count in sorted({len(item.forecast.plan.stages) for item in candidates}):
        same_count = [item for item in candidates if len(item.forecast.plan.stages) == count]
        label = "ordinary training" if count == 1 else f"{count} stages"
        axes.plot(*_points(same_count), ".", alpha=0.4, label=label)
    axes.plot(*_points(front), "k.-", drawstyle="steps-post", label="Pareto front")
    for name, mark_bytes in marks.items():
        axes.axhline(mark_bytes / 2**30, linestyle="--", color="gray", label=name)
    axes.set(xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _points(items: list[Candidate]) -> tuple[list[float], list[float]]:
    return [item.step_seconds for item in items], [item.forecast.peak_bytes / 2**30 for item in items]


def _powers(limit: int) -> list[int]:
    """Powers of two, 1, 2, 4, ..., up to `limit`."""
    return [2**exponent for exponent in range(limit.bit_length())]

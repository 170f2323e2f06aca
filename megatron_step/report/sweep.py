"""Plans of a model over numbers of stages, adapter ranks, layouts and recompute: which of them none beats.

A plan is on the Pareto front if no other one needs less memory and is as fast, or is faster with as little memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from megatron_step.config.cluster import Cluster
from megatron_step.config.run import RunConfig, check_world
from megatron_step.plan.old_layers import adapts
from megatron_step.planner.forecast import Forecast, forecast
from megatron_step.report.text_table import aligned, format_bytes

COUNTS = (1, 2, 3, 4, 6)
"""Numbers of stages that are tried."""
RANKS = (16, 64, 128)
"""Ranks of adapters that are tried."""

RECOMPUTES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
"""What is recomputed."""


@dataclass(frozen=True)
class Candidate:
    """A config, and what its plan will need."""

    config: RunConfig
    """The config."""
    dp_size: int
    """Its data-parallel ranks."""
    forecast: Forecast
    """Its plan."""

    @property
    def step_seconds(self) -> float:
        """Of a step, on average over the run."""
        return self.forecast.seconds / self.forecast.plan.num_steps


def variants(config: RunConfig, world_size: int, cluster: Cluster) -> Iterator[tuple[RunConfig, int]]:
    """Every config that is tried, and its data-parallel size; none that cannot run on `world_size` GPUs."""
    largest = min(group.gpus_per_node for group in cluster.nodes)
    tensor_sizes = [size for size in _powers(largest) if largest % size == 0]
    pipelines = [size for size in _powers(world_size) if size <= config.model.num_layers]
    for count, rank, tensor, pipeline, recompute in product(COUNTS, RANKS, tensor_sizes, pipelines, RECOMPUTES):
        if count == 1 and rank != RANKS[0]:
            continue  # a model that does not grow has no adapters
        try:
            changed = replace(
                config,
                stages=replace(config.stages, count=count, layers="auto", layouts="auto"),
                adapter=replace(config.adapter, rank=rank),
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
        yield changed, changed.parallel.data_parallel_size(world_size)


def candidate(config: RunConfig, dp_size: int, vocab_size: int, cluster: Cluster) -> Candidate | None:
    """The plan of a variant; None if there is none."""
    try:
        return Candidate(config, dp_size, forecast(config, vocab_size, dp_size, cluster))
    except ValueError:
        return None


def pareto_front(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both peak memory and time, by memory."""
    front: list[Candidate] = []
    for item in sorted(candidates, key=lambda item: (item.forecast.peak_bytes, item.step_seconds)):
        if not front or item.step_seconds < front[-1].step_seconds:
            front.append(item)
    return front


def front_table(front: list[Candidate]) -> str:
    """A line for each plan."""
    rows = [("peak", "fits", "s/step", "stages", "layers", "adapter rank", "TP", "PP", "DP", "recompute")]
    for item in front:
        parallel, plan = item.config.parallel, item.forecast.plan
        rows.append(
            (
                format_bytes(item.forecast.peak_bytes),
                "no" if item.forecast.status == "infeasible" else "yes",
                f"{item.step_seconds:.3g}",
                str(len(plan.stages)),
                "+".join(str(stage.num_new_layers) for stage in plan.stages),
                str(item.config.adapter.rank) if adapts(item.config) else "-",
                str(parallel.tensor_parallel_size),
                str(parallel.pipeline_parallel_size),
                str(item.dp_size),
                parallel.recompute,
            )
        )
    return aligned(rows)


def plot(candidates: list[Candidate], front: list[Candidate], path: Path, marks: dict[str, float]) -> None:
    """Memory over time of all candidates, the front among them, as a PNG; `marks` are bytes to draw a line at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of a step, on average over the run", ylabel="peak memory of a GPU, GiB")
    for count in sorted({len(item.forecast.plan.stages) for item in candidates}):
        of_count = [item for item in candidates if len(item.forecast.plan.stages) == count]
        label = "ordinary training" if count == 1 else f"{count} stages"
        axes.plot(*_points(of_count), ".", alpha=0.4, label=label)
    axes.plot(*_points(front), "k.-", drawstyle="steps-post", label="Pareto front")
    for name, at_bytes in marks.items():
        axes.axhline(at_bytes / 2**30, linestyle="--", color="gray", label=name)
    axes.set(xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _points(items: list[Candidate]) -> tuple[list[float], list[float]]:
    return [item.step_seconds for item in items], [item.forecast.peak_bytes / 2**30 for item in items]


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`."""
    return [2**exponent for exponent in range(limit.bit_length())]

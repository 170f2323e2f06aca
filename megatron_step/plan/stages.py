"""The plan of a run: every stage's layers, where they come from, its steps and its pipeline layout."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megatron_step.config.parallel import ParallelConfig
from megatron_step.plan.layout import Chunk, rank_chunks
from megatron_step.plan.operators import GrownLayer


@dataclass(frozen=True)
class Stage:
    """A growth stage."""

    index: int
    """Index of the stage, from 0."""
    layers: tuple[GrownLayer, ...]
    """Layers of the stage's model, bottom up."""
    first_step: int
    """Steps of the run that are finished when it begins."""
    last_step: int
    """Steps of the run that are finished when it ends: the model then grows, or the run ends."""
    schedule_steps: int
    """Steps that its learning-rate schedule is laid out for."""
    grows: bool
    """Whether the model grows at its end; the run's last stage does not."""
    layout: tuple[int, ...]
    """Layers of each pipeline rank; with virtual pipelines of each chunk, in the order of the layers."""
    turn_groups: tuple[tuple[int, ...], ...] = ()
    """Numbers of the old layers of each pipeline rank, for a policy that trains a share of each group in turn. A run
    that resumes in another layout keeps the groups of the stages that it has begun, to train the same layers."""

    @property
    def number(self) -> int:
        """Number of the stage for people, from 1."""
        return self.index + 1

    @property
    def num_steps(self) -> int:
        """Steps that it takes. A first stage of no steps is a model trained before: it is never built."""
        return self.last_step - self.first_step

    @property
    def num_layers(self) -> int:
        """Depth of the model."""
        return len(self.layers)

    @property
    def num_new_layers(self) -> int:
        """Layers that it adds."""
        return sum(layer.born == self.index for layer in self.layers)

    def layers_of(self, chunk: Chunk) -> range:
        """Numbers, from 0, of the layers of a model chunk."""
        start = sum(self.layout[: chunk.index])
        return range(start, start + self.layout[chunk.index])


@dataclass(frozen=True)
class Solution:
    """The proven quality of a plan."""

    status: Literal["optimal", "feasible"]
    """Whether no plan is better, or none was found that is."""
    kind: Literal["memory", "time"]
    """The minimised quantity: the largest share of a rank's memory, or the time of all steps."""
    objective: float
    """The plan's: of the capacity, or in bytes where machines have no limit; seconds, or operations of a GPU."""
    bound: float
    """No plan is below."""


@dataclass(frozen=True)
class StagePlan:
    """All stages of a run, in order."""

    stages: tuple[Stage, ...]
    """The stages."""
    solution: Solution | None = None
    """Solution of the integer program; None if the config gives layers and layouts."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].last_step

    def stage_at(self, step: int) -> Stage:
        """The stage of the step that follows `step` finished ones; of the last step and beyond, the last stage."""
        return next((stage for stage in self.stages if step < stage.last_step), self.stages[-1])

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return asdict(self)


def plan_from_dict(values: dict[str, Any]) -> StagePlan:
    """The plan that `to_dict` of it, or of its forecast, gave.

    Raises ValueError if `values` is not such a plan.
    """
    try:
        solution = values.get("solution")
        stages = tuple(_stage_from_dict(stage) for stage in values["stages"])
        return StagePlan(stages, Solution(**solution) if solution else None)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a plan of stages: {error}") from None


def _stage_from_dict(values: dict[str, Any]) -> Stage:
    groups = tuple(map(_whole, values.get("turn_groups", ())))  # older plans have none
    known = {field.name: values[field.name] for field in fields(Stage) if field.name != "turn_groups"}
    layers = tuple(GrownLayer(_whole(layer["sources"]), *_whole([layer["born"]])) for layer in values["layers"])
    _whole([values[name] for name in ("index", "first_step", "last_step", "schedule_steps")])
    return Stage(**{**known, "layers": layers, "layout": _whole(values["layout"]), "turn_groups": groups})


def _whole(values: Any) -> tuple[int, ...]:
    """A list of whole numbers; raises TypeError if it is none."""
    if not isinstance(values, (list, tuple)) or any(type(value) is not int for value in values):
        raise TypeError(f"{str(values)[:80]} are not whole numbers")
    return tuple(values)


def even_layout(num_layers: int, chunks: int) -> tuple[int, ...]:
    """`num_layers` spread over `chunks` as evenly as can be; earlier chunks, which hold no output layer, get more."""
    return tuple(num_layers // chunks + (chunk < num_layers % chunks) for chunk in range(chunks))


def turn_groups(stage: Stage, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Return the old layers of each pipeline rank that has some, in the layout of `stage`."""
    ranks = [rank_chunks(parallel, rank) for rank in range(parallel.pipeline_parallel_size)]
    layers = [[layer for chunk in chunks for layer in stage.layers_of(chunk)] for chunks in ranks]
    groups = [tuple(layer for layer in own if stage.layers[layer].born < stage.index) for own in layers]
    return tuple(group for group in groups if group)


def first_steps(budgets: Sequence[int], times: Sequence[float]) -> list[tuple[int, int]]:
    """First and last step of each stage: it ends after the share `times` of its budget, but not before a step."""
    ends = []
    start = 0
    for budget, time in zip(budgets, times):
        end = start + min(budget, max(1, round(time * budget)))
        ends.append((start, end))
        start = end
    return ends

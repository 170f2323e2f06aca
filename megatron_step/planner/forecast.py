"""The forecast of a plan: memory of every rank in every stage, and time, beside those of ordinary training."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_step.config.cluster import Cluster
from megatron_step.config.load import load_cluster
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import StagesConfig
from megatron_step.config.yaml_json import read_json
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage, StagePlan, plan_from_dict
from megatron_step.planner.costs.held import HeldChunk, held_chunks
from megatron_step.planner.costs.machines import Machine, pipeline_machines
from megatron_step.planner.costs.memory import HostMemory, RankMemory, growth_bytes, host_memory, rank_memory
from megatron_step.planner.costs.stage_costs import RunCosts, StageCosts, layer_seconds, rank_seconds, run_costs
from megatron_step.planner.plan import check_growth, plan_by_costs


@dataclass(frozen=True)
class RankForecast:
    """A pipeline rank in a stage."""

    old_layers: int
    """Layers that it holds and the stage found."""
    new_layers: int
    """Layers that it holds and the stage adds."""
    memory: RankMemory
    """Memory of the fullest of its tensor- and data-parallel ranks."""
    growth_bytes: int
    """Bytes that the rank needs beside the model states while the model grows into the stage."""
    host: HostMemory
    """Host memory of saves, loads and resting layers."""
    capacity_bytes: int | None
    """Bytes that the rank may fill; None for no limit."""

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the rank, in training and in growth."""
        return max(self.memory.peak_bytes, self.memory.model_state_bytes + self.growth_bytes)

    @property
    def share(self) -> float:
        """Share of the capacity; bytes where there is no limit."""
        return self.peak_bytes / (self.capacity_bytes or 1)


@dataclass(frozen=True)
class StageForecast:
    """A stage."""

    stage: Stage
    """The stage."""
    ranks: tuple[RankForecast, ...]
    """Pipeline ranks of the stage."""
    step_seconds: float
    """Seconds of an optimizer step; with unknown machines, operations of a rank."""

    @property
    def seconds(self) -> float:
        """Seconds of all the stage's steps."""
        return self.step_seconds * self.stage.num_steps

    @property
    def fullest(self) -> RankForecast:
        """The rank that needs the largest share of its capacity."""
        return max(self.ranks, key=lambda rank: rank.share)

    @property
    def peak_bytes(self) -> int:
        """Largest peak of a rank."""
        return max(rank.peak_bytes for rank in self.ranks)


@dataclass(frozen=True)
class Forecast:
    """A plan, and ordinary training of the same model for as many steps on the same machines."""

    plan: StagePlan
    """The plan."""
    stages: tuple[StageForecast, ...]
    """Stages of the plan."""
    vanilla: StageForecast
    """All layers from the start, in the layout that is best for them."""

    @property
    def peak_bytes(self) -> int:
        """Largest peak of a rank in any stage."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def status(self) -> str:
        """optimal, feasible, infeasible, or given where there was nothing to choose."""
        if any(rank.capacity_bytes and rank.share > 1 for stage in self.stages for rank in stage.ranks):
            return "infeasible"
        return self.plan.solution.status if self.plan.solution else "given"

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as plain values for JSON; `plan_from_dict` reads the plan from them."""
        solution, share = self.plan.solution, max(stage.fullest.share for stage in self.stages)
        return {
            "status": self.status,
            "minimised": solution.kind if solution else None,
            "objective": solution.objective if solution else share,
            "bound": solution.bound if solution else share,
            "stages": [_stage_dict(stage) for stage in self.stages],
            "peak_bytes": self.peak_bytes,
            "vanilla_peak_bytes": self.vanilla.peak_bytes,
            "reduction": 1 - self.peak_bytes / self.vanilla.peak_bytes,
            "time_against_vanilla": self.seconds / self.vanilla.seconds,
            "solution": asdict(solution) if solution else None,
        }


def plan_and_forecast(
    resolved: ResolvedConfig, chosen: Sequence[int] | None = None, begun: Sequence[Stage] = ()
) -> Forecast:
    """Return the plan of a run and what it will need, by the files that the config names.

    `chosen` and `begun` are as in `plan_by_costs`.

    Raises ValueError if there is no such plan, it does not fit the machines, or the config has planner keys that only
    the plan command takes.
    """
    config = resolved.config
    if others := config.planner.plan_only_keys:
        raise ValueError(f"{others}: megatron-step plan takes this, training does not: leave it out")
    cluster = load_cluster(Path(config.planner.cluster)) if config.planner.cluster else None
    if config.planner.plan:
        resolved = resolved.with_config(with_plan(config, Path(config.planner.plan)))
    planned = forecast(resolved, cluster, chosen, begun)
    check_fits(planned)
    return planned


def forecast(
    resolved: ResolvedConfig,
    cluster: Cluster | None = None,
    chosen: Sequence[int] | None = None,
    begun: Sequence[Stage] = (),
) -> Forecast:
    """Return the plan of a run on the machines of `cluster`, and what it will need.

    Raises ValueError as `make_plan` does.
    """
    check_growth(resolved.config)
    machines = pipeline_machines(cluster, resolved.config.parallel, resolved.dp_size)
    costs = run_costs(resolved)
    plan = plan_by_costs(resolved, costs, machines, chosen, begun)
    ordinary = resolved.with_config(vanilla_config(resolved.config, plan))
    vanilla = plan_by_costs(ordinary, costs, machines)  # whose layers cost what those of a first stage do
    return Forecast(
        plan,
        tuple(_stage_forecast(resolved, stage, costs, machines) for stage in plan.stages),
        _stage_forecast(ordinary, vanilla.stages[0], costs, machines),
    )


def with_plan(config: RunConfig, path: Path) -> RunConfig:
    """`config` with the layers and layouts of the plan in a JSON file.

    Raises ValueError if the file holds no plan, or one of another run.
    """
    try:
        plan = plan_from_dict(read_json(path))
    except OSError as error:
        raise ValueError(f"cannot read the plan {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a plan that megatron-step plan wrote: {error}") from None
    layers = [stage.num_new_layers for stage in plan.stages]
    if len(layers) != config.stages.count or sum(layers) != config.model.num_layers:
        raise ValueError(
            f"{path} is the plan of another run: it adds {layers} layers, but stages.count is {config.stages.count} "
            f"and model.num_layers {config.model.num_layers}"
        )
    if config.stages.layers not in ("auto", layers):
        raise ValueError(
            f"stages.layers {config.stages.layers} differ from {layers} in the plan {path}: set stages.layers to auto"
        )
    layouts = [list(stage.layout) for stage in plan.stages]
    return replace(config, stages=replace(config.stages, layers=layers, layouts=layouts))


def vanilla_config(config: RunConfig, plan: StagePlan) -> RunConfig:
    """Ordinary training of the same model for as many steps, in the layout that needs least memory.

    Its states are `full`, whatever the run's are; with planner.recipe both have those of the recipe.
    """
    layouts = config.stages.layouts if config.stages.layouts == "even" else "auto"
    stages = StagesConfig(steps=plan.num_steps, layouts=layouts, start_from=config.stages.start_from)
    planner = replace(config.planner, objective="memory", time_limit=config.planner.time_limit / 8)
    optimizer = replace(config.optimizer, states="full", gradients=None, correction_bits=16)
    return replace(config, stages=stages, optimizer=optimizer, planner=planner)


def check_fits(found: Forecast) -> None:
    """Raise ValueError, naming stage and rank, if a rank's memory is too small."""
    for stage in found.stages:
        rank = stage.fullest
        if rank.capacity_bytes and rank.share > 1:
            short = (rank.peak_bytes - rank.capacity_bytes) / 2**30
            raise ValueError(
                f"stage {stage.stage.number} needs {rank.peak_bytes / 2**30:.2f} GiB on pipeline rank "
                f"{stage.ranks.index(rank)}, {short:.2f} GiB more than it has: megatron-step plan --explain says "
                "what would make it fit"
            )


def _stage_forecast(
    resolved: ResolvedConfig, stage: Stage, costs: RunCosts, machines: Sequence[Machine]
) -> StageForecast:
    stage_costs = costs.stage(stage.index)
    ranks, seconds = [], []
    policy, config = policy_of(resolved.config), resolved.config
    turns = range(policy.num_turns(stage, config) if stage.index and stage.num_steps else 1)
    by_rank = zip(*(held_chunks(resolved, stage, turn) for turn in turns))
    for machine, rank_turns, cost in zip(machines, by_rank, stage_costs.ranks):
        forecasts = [_rank_forecast(resolved, stage, chunks, machine) for chunks in rank_turns]
        rank = max(forecasts, key=lambda turn: turn.peak_bytes)
        ranks.append(rank)
        seconds.append(rank_seconds(stage_costs, cost, machine) + _layers_seconds(stage_costs, rank, machine))
    return StageForecast(stage, tuple(ranks), max(seconds))


def _rank_forecast(
    resolved: ResolvedConfig, stage: Stage, chunks: Sequence[HeldChunk], machine: Machine
) -> RankForecast:
    numbers = [number for held in chunks for number in held.layers]
    new = sum(stage.layers[number].born == stage.index for number in numbers)
    parameters = [parameter for held in chunks for parameter in held.parameters]
    runs = stage.num_steps > 0
    return RankForecast(
        old_layers=len(numbers) - new,
        new_layers=new,
        memory=rank_memory(resolved, stage, chunks),
        growth_bytes=growth_bytes(parameters, stage) if runs else 0,
        host=host_memory(resolved, parameters) if runs else HostMemory(0, 0),
        capacity_bytes=machine.capacity_bytes,
    )


def _layers_seconds(costs: StageCosts, rank: RankForecast, machine: Machine) -> float:
    new, old = (layer_seconds(costs, layer, machine) for layer in (costs.new, costs.old))
    return rank.new_layers * new + rank.old_layers * old


def _stage_dict(forecast: StageForecast) -> dict[str, Any]:
    stage = forecast.stage
    return {
        **asdict(stage),
        "num_layers": stage.num_layers,
        "new_layers": stage.num_new_layers,
        "step_seconds": forecast.step_seconds,
        "ranks": [
            {
                "pp_rank": pp_rank,
                "old_layers": rank.old_layers,
                "new_layers": rank.new_layers,
                "bytes": asdict(rank.memory),
                "growth_bytes": rank.growth_bytes,
                "checkpoint_host_bytes": rank.host.save_bytes,
                "load_host_bytes": rank.host.load_bytes,
                "resting_host_bytes": rank.host.resting_bytes,
                "total_bytes": rank.peak_bytes,
                "capacity_bytes": rank.capacity_bytes,
            }
            for pp_rank, rank in enumerate(forecast.ranks)
        ],
    }

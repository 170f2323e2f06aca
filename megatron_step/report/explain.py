"""The memory that an infeasible plan lacks, and the smallest changes that would make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from megatron_step.config.cluster import Cluster
from megatron_step.config.run import RunConfig, check_world
from megatron_step.plan.old_layers import adapts
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.planner.forecast import Forecast, forecast


@dataclass(frozen=True)
class Shortage:
    """A pipeline rank that has too little memory in a stage."""

    stage: Stage
    """The stage."""
    pp_rank: int
    """The pipeline rank."""
    missing_bytes: int
    """Bytes that the rank lacks."""


def shortages(found: Forecast) -> list[Shortage]:
    """Return the shortage of every rank that lacks memory in a stage."""
    return [
        Shortage(stage.stage, pp_rank, rank.peak_bytes - rank.capacity_bytes)
        for stage in found.stages
        for pp_rank, rank in enumerate(stage.ranks)
        if rank.capacity_bytes is not None and rank.peak_bytes > rank.capacity_bytes
    ]


def least_memory(resolved: ResolvedConfig, cluster: Cluster | None) -> Forecast:
    """Return the plan of the least memory, whether it fits or not.

    Raises ValueError if the run cannot be split over its ranks, or over those of the cluster, at all.
    """
    config = resolved.config
    check_world(config, resolved.world_size)
    objective = "memory_then_time" if config.planner.objective == "time" else config.planner.objective
    config = replace(config, planner=replace(config.planner, objective=objective))
    return forecast(resolved.with_config(config), cluster)


def changes_that_fit(resolved: ResolvedConfig, cluster: Cluster | None) -> list[tuple[str, Forecast]]:
    """Return single changes of keys that make the plan fit, or pairs if no single one does: what changes, and the plan.

    The world stays as it is.
    """
    singles = list(_changes(resolved.config))
    for number in (1, 2):
        fitting = []
        for chosen in combinations(singles, number):
            changed = _changed(resolved.config, [change for _, change in chosen])
            try:
                found = least_memory(resolved.with_config(changed), cluster) if changed else None
            except ValueError:
                continue  # a config with these changes cannot run
            if found and not shortages(found):
                fitting.append((", ".join(name for name, _ in chosen), found))
        if fitting:
            return sorted(fitting, key=lambda item: item[1].seconds)
    return []


_Change = dict[str, object]
"""Values by dotted key, such as parallel.recompute."""


def _changes(config: RunConfig) -> Iterator[tuple[str, _Change]]:
    """Yield one change, with its text, for every key that trades time, machines or quality for memory."""
    parallel, training = config.parallel, config.training
    values: list[_Change] = []
    if config.stages.layers == "auto":
        values += [{"stages.count": config.stages.count + more} for more in (1, 2)]
    if adapts(config) and config.adapter.rank % 2 == 0:
        values.append({"adapter.rank": config.adapter.rank // 2})
    if training.micro_batch_size % 2 == 0:
        values.append({"training.micro_batch_size": training.micro_batch_size // 2})
    if not parallel.distributed_optimizer:
        values.append({"parallel.distributed_optimizer": True})
    for recompute in {"none": ("selective", "full"), "selective": ("full",)}.get(parallel.recompute, ()):
        values.append({"parallel.recompute": recompute})
    if parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel:
        values.append({"parallel.sequence_parallel": True})
    values.append({"parallel.tensor_parallel_size": 2 * parallel.tensor_parallel_size})
    values.append({"parallel.pipeline_parallel_size": 2 * parallel.pipeline_parallel_size})
    for value in values:
        yield "; ".join(f"{key} {_text(setting)}" for key, setting in value.items()), value


def _text(setting: object) -> str:
    return str(setting).lower() if isinstance(setting, bool) else str(setting)


def _changed(config: RunConfig, changes: list[_Change]) -> RunConfig | None:
    """Return `config` with all changes; None if two change the same key, or if the result is not valid."""
    merged: _Change = {}
    for change in changes:
        if merged.keys() & change.keys():
            return None
        merged.update(change)
    try:
        for key, value in merged.items():
            section, name = key.split(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    except ValueError:
        return None
    return config

"""Logging as a hook of the training loop: speed, memory, and the trackers that take each step's metrics."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch

from megatron_step.config.run import LoggingConfig, RunConfig
from megatron_step.engine.messages import say
from megatron_step.engine.parallel import Parallel
from megatron_step.engine.peak import dense_peak_flops
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import StagePlan
from megatron_step.planner.costs.flops import run_flops, stage_flops_per_token
from megatron_step.planner.costs.memory import RankMemory, stage_memory
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.summary import memory_summary
from megatron_step.training.trackers.metrics_file import MetricsFile
from megatron_step.training.trackers.progress import progress
from megatron_step.training.trackers.tracker import MakeTracker, TrackedRun, Tracker, guarded
from megatron_step.training.trackers.wandb import WeightsAndBiases


@contextmanager
def logging_hook(
    config: RunConfig,
    plan: StagePlan,
    vocab_size: int,
    parallel: Parallel,
    first_step: int,
    trackers: Sequence[MakeTracker] = (),
) -> Iterator[Hook]:
    """Yield a hook that gives each step's metrics to the trackers of the config and to `trackers`.

    The hook adds speed and memory to the metrics. This process trains the steps after `first_step`.
    """
    peak = _peak_flops(config.training.precision)
    resolved = resolve(config, vocab_size, parallel.dp_size)
    flops_per_token = [stage_flops_per_token(resolved, stage) for stage in plan.stages]
    measured: dict[int, dict[str, Any]] = {}  # the memory of each stage
    with ExitStack() as stack:
        tracked = TrackedRun(config, plan.num_steps, first_step)
        makers = [*_trackers(config.logging), *trackers] if parallel.is_main else []
        writes = [stack.enter_context(guarded(make, tracked)) for make in makers]

        def hook(context: StepContext) -> None:
            stage, metrics = context.state.stage, context.metrics
            if context.memory is not None:
                planned = stage_memory(resolved, stage)
                measured[stage.index] = _memory_entry(
                    context.memory, context.state.growth_peak_bytes, planned, parallel
                )
                if parallel.is_main:
                    say(memory_summary(measured[stage.index]["ranks"]))
            flops = metrics["tokens_per_second"] * flops_per_token[stage.index] / parallel.world_size
            metrics["tflops_per_second"] = flops / 1e12  # per rank
            metrics["flops"] = run_flops(config, plan, flops_per_token, metrics["step"])
            if peak is not None:
                metrics["mfu"] = flops / peak
            logged = context.is_last or metrics["step"] % config.logging.interval == 0
            if context.memory is not None:
                metrics["memory"] = measured[stage.index]
            elif logged and stage.index in measured:
                metrics["memory"] = {name: value for name, value in measured[stage.index].items() if name != "ranks"}
                metrics["memory"].update(context.state.save_memory)
            for write in writes:
                write(metrics, logged)

        yield hook


def _trackers(logging: LoggingConfig) -> list[MakeTracker]:
    """Return the trackers that the config names."""
    made: list[MakeTracker] = [MetricsFile, progress]
    if logging.tensorboard:
        made.append(_tensorboard)
    if logging.wandb is not None:
        made.append(WeightsAndBiases)
    return made


def _tensorboard(run: TrackedRun) -> Tracker:
    from megatron_step.training.trackers.tensorboard import TensorBoard  # imported only if it is used

    return TensorBoard(run)


def _memory_entry(
    own: RankMemory, growth_peak_bytes: int | None, planned: Sequence[RankMemory], parallel: Parallel
) -> dict[str, Any]:
    """Return the largest bytes of each kind over all ranks, and the planned and measured bytes of each rank."""
    gathered: list[Any] = [None] * parallel.world_size
    torch.distributed.all_gather_object(gathered, (parallel.pp_rank, own, growth_peak_bytes))
    entry: dict[str, Any] = {"planned_bytes": max(memory.peak_bytes for memory in planned)}
    for name in ("model_state_bytes", "activation_bytes", "peak_bytes"):
        entry[name] = max(getattr(memory, name) for _, memory, _ in gathered)
    if growth_peak_bytes is not None:
        entry["growth_peak_bytes"] = max(growth for _, _, growth in gathered)
    entry["ranks"] = [
        {"pp_rank": pp_rank, "planned": _kinds(planned[pp_rank]), "measured": _kinds(memory)}
        for pp_rank, memory, _ in gathered
    ]
    return entry


def _kinds(memory: RankMemory) -> dict[str, int]:
    """Return the bytes of each kind, and their sums."""
    return {**asdict(memory), "model_state_bytes": memory.model_state_bytes, "peak_bytes": memory.peak_bytes}


def _peak_flops(precision: str) -> float | None:
    if not torch.cuda.is_available():
        return None
    return dense_peak_flops(torch.cuda.get_device_name(), precision)

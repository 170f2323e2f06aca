"""What a run shows and writes about itself: progress, metrics.jsonl, TensorBoard, Weights & Biases."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.engine.peak import dense_peak_flops
from megatron_step.planner.flops import stage_flops_per_token
from megatron_step.planner.memory import RankMemory, stage_memory
from megatron_step.planner.stages import StagePlan
from megatron_step.training.stage import Hook, Metrics, StepContext
from megatron_step.training.summary import memory_summary


@contextmanager
def logging_hook(
    config: RunConfig, plan: StagePlan, vocab_size: int, parallel: Parallel, first_step: int
) -> Iterator[Hook]:
    """A hook that writes each step's line, and shows and plots it every `logging.interval` steps.

    The lines of steps after `first_step` that an earlier, interrupted process left are dropped: they are trained again.
    """
    peak = _peak_flops(config.training.precision)
    flops_per_token = [stage_flops_per_token(config, stage, vocab_size) for stage in plan.stages]
    measured: dict[int, dict[str, Any]] = {}  # the memory of each stage
    with ExitStack() as stack:
        sinks = _sinks(stack, config, plan.num_steps, first_step) if parallel.is_main else []

        def hook(context: StepContext) -> None:
            stage, metrics = context.state.stage, context.metrics
            if context.memory is not None:
                planned = stage_memory(config, stage, vocab_size, parallel.dp_size)
                measured[stage.index] = _memory_entry(
                    context.memory, context.state.growth_peak_bytes, planned, parallel
                )
                if parallel.is_main:
                    print(memory_summary(measured[stage.index]["ranks"]), flush=True)
            flops = metrics["tokens_per_second"] * flops_per_token[stage.index] / parallel.world_size
            metrics["tflops_per_second"] = flops / 1e12  # of one rank
            if peak is not None:
                metrics["mfu"] = flops / peak
            logged = context.is_last or metrics["step"] % config.logging.interval == 0
            if context.memory is not None:
                metrics["memory"] = measured[stage.index]
            elif logged and stage.index in measured:
                metrics["memory"] = {name: value for name, value in measured[stage.index].items() if name != "ranks"}
            for sink in sinks:
                sink(metrics, logged)

        yield hook


Sink = Callable[[Metrics, bool], None]
"""Takes a step's metrics, and whether it is one to show."""


def _sinks(stack: ExitStack, config: RunConfig, total_steps: int, first_step: int) -> list[Sink]:
    output = Path(config.output_dir)
    sinks = [
        stack.enter_context(_metrics_file(output / "metrics.jsonl", first_step)),
        stack.enter_context(_progress(total_steps, first_step)),
    ]
    if config.logging.tensorboard:
        sinks.append(stack.enter_context(_tensorboard(output / "tensorboard", first_step)))
    if config.logging.wandb is not None:
        sinks.append(stack.enter_context(_wandb(config, output)))
    return sinks


@contextmanager
def _metrics_file(path: Path, first_step: int) -> Iterator[Sink]:
    if path.exists():
        _keep_lines(path, first_step)
    waiting = b""  # what a full disk has not taken yet
    with path.open("ab", buffering=0) as stream:

        def write(metrics: Metrics | None, logged: bool) -> None:
            nonlocal waiting
            waiting += json.dumps(metrics).encode() + b"\n" if metrics is not None else b""
            try:
                while waiting:
                    waiting = waiting[stream.write(waiting) :]
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

        try:
            yield write
        finally:
            write(None, False)
            if waiting:
                print(f"warning: the last lines of {path} are missing: the disk is full", file=sys.stderr, flush=True)


def _keep_lines(path: Path, last_step: int) -> None:
    """Keep the whole lines of steps up to `last_step`."""
    kept = path.with_suffix(".tmp")
    with path.open(encoding="utf-8") as old, kept.open("w", encoding="utf-8") as new:
        for line in old:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a crash
            if step <= last_step:
                new.write(line)
    os.replace(kept, path)


@contextmanager
def _progress(total_steps: int, first_step: int) -> Iterator[Sink]:
    """A bar on a terminal, else a line for each step to show."""
    if not sys.stderr.isatty():
        yield lambda metrics, logged: print(_line(metrics, total_steps), flush=True) if logged else None
        return
    with tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True) as bar:

        def show(metrics: Metrics, logged: bool) -> None:
            bar.set_postfix_str(
                f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s", refresh=False
            )
            bar.update(metrics["step"] - bar.n)
            if "validation_loss" in metrics:
                bar.write(_line(metrics, total_steps))

        yield show


def _line(metrics: Metrics, total_steps: int) -> str:
    parts = [
        f"step {metrics['step']}/{total_steps}",
        f"loss {metrics['loss']:.4f}",
        f"learning rate {metrics['learning_rate']:.2e}",
        f"gradient norm {metrics['grad_norm']:.3f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"{metrics['tflops_per_second']:.3g} TFLOP/s",
    ]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if "memory" in metrics:
        parts.append(f"peak memory {metrics['memory']['peak_bytes'] / 2**20:,.0f} MiB")
    if "validation_loss" in metrics:
        parts.append(f"validation loss {metrics['validation_loss']:.4f}")
        parts.append(f"perplexity {metrics['validation_perplexity']:.2f}")
    return " | ".join(parts)


@contextmanager
def _tensorboard(folder: Path, first_step: int) -> Iterator[Sink]:
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    with SummaryWriter(str(folder), purge_step=first_step + 1) as writer:

        def write(metrics: Metrics, logged: bool) -> None:
            if logged or "validation_loss" in metrics:
                for name, value in _scalars(metrics).items():
                    writer.add_scalar(name, value, metrics["step"])

        yield write


@contextmanager
def _wandb(config: RunConfig, output: Path) -> Iterator[Sink]:
    import wandb  # optional: `run` has checked that it is there

    # One id a folder, so that a resumed run goes on in the same plots.
    run = wandb.init(project=config.logging.wandb, config=asdict(config), dir=output, id=output.name, resume="allow")

    def write(metrics: Metrics, logged: bool) -> None:
        if logged or "validation_loss" in metrics:
            run.log(_scalars(metrics), step=metrics["step"])

    try:
        yield write
    finally:
        run.finish()


def _scalars(metrics: Metrics) -> dict[str, float]:
    scalars = {name: value for name, value in metrics.items() if isinstance(value, float)}
    memory: dict[str, Any] = metrics.get("memory", {})
    scalars.update({f"memory/{name}": value for name, value in memory.items() if isinstance(value, int)})
    return scalars


def _memory_entry(
    own: RankMemory, growth_peak_bytes: int | None, planned: Sequence[RankMemory], parallel: Parallel
) -> dict[str, Any]:
    """The largest of each kind over ranks, and of each rank, in their order, what was planned and measured."""
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
    """Bytes by kind, with what they come to."""
    return {**asdict(memory), "model_state_bytes": memory.model_state_bytes, "peak_bytes": memory.peak_bytes}


def _peak_flops(precision: str) -> float | None:
    if not torch.cuda.is_available():
        return None
    return dense_peak_flops(torch.cuda.get_device_name(), precision)

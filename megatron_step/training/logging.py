"""What a run shows and writes about itself: progress, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.engine.peak import dense_peak_flops
from megatron_step.planner.flops import training_flops_per_token
from megatron_step.training.memory import Memory
from megatron_step.training.stage import Hook, Metrics, StepContext


@contextmanager
def logging_hook(config: RunConfig, vocab_size: int, parallel: Parallel, first_step: int) -> Iterator[Hook]:
    """A hook that writes each step's line, and shows and plots it every `logging.interval` steps.

    The lines of steps after `first_step` that an earlier, interrupted process left are dropped: they are trained again.
    """
    flops_per_token = training_flops_per_token(config.model, vocab_size)
    peak = _peak_flops(config.training.precision)
    ranks_memory: list[Memory] = []
    with ExitStack() as stack:
        sinks = _sinks(stack, config, first_step) if parallel.is_main else []

        def hook(context: StepContext) -> None:
            if context.memory is not None:
                ranks_memory[:] = _gather(context.memory, parallel)
            metrics = context.metrics
            flops = metrics["tokens_per_second"] * flops_per_token / parallel.world_size
            metrics["tflops_per_second"] = flops / 1e12  # of one rank
            if peak is not None:
                metrics["mfu"] = flops / peak
            logged = context.is_last or metrics["step"] % config.logging.interval == 0
            if ranks_memory and (logged or context.memory is not None):
                metrics["memory"] = _memory_entry(ranks_memory, all_ranks=context.memory is not None)
            for sink in sinks:
                sink(metrics, logged)

        yield hook


Sink = Callable[[Metrics, bool], None]
"""Takes a step's metrics, and whether it is one to show."""


def _sinks(stack: ExitStack, config: RunConfig, first_step: int) -> list[Sink]:
    output = Path(config.output_dir)
    sinks = [
        stack.enter_context(_metrics_file(output / "metrics.jsonl", first_step)),
        stack.enter_context(_progress(config.stages.steps, first_step)),
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
    with path.open("a", encoding="utf-8") as stream:

        def write(metrics: Metrics, logged: bool) -> None:
            stream.write(json.dumps(metrics) + "\n")
            stream.flush()

        yield write


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


def _gather(memory: Memory, parallel: Parallel) -> list[Memory]:
    ranks: list[Memory | None] = [None] * parallel.world_size
    torch.distributed.all_gather_object(ranks, memory)
    return [rank for rank in ranks if rank is not None]


def _memory_entry(ranks: list[Memory], all_ranks: bool) -> dict[str, Any]:
    """The largest of each kind over ranks; with `all_ranks` also each rank's, in the order of the ranks."""
    names = ("model_state_bytes", "activation_bytes", "peak_bytes")
    entry: dict[str, Any] = {name: max(getattr(rank, name) for rank in ranks) for name in names}
    if all_ranks:
        entry["ranks"] = [{name: getattr(rank, name) for name in names} for rank in ranks]
    return entry


def _peak_flops(precision: str) -> float | None:
    if not torch.cuda.is_available():
        return None
    return dense_peak_flops(torch.cuda.get_device_name(), precision)

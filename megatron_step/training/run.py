"""A run from its config to its last checkpoint."""

import os
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_step.checkpoint.directory import list_checkpoints, set_aside
from megatron_step.checkpoint.load import FoundCheckpoint, find_checkpoint, load_checkpoint
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.load import config_text
from megatron_step.config.run import RunConfig, check_world, consumed_samples
from megatron_step.data.fingerprint import data_fingerprint
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer
from megatron_step.engine.parallel import Parallel, first_problem, parallel_layout, start_world, stop_world
from megatron_step.training.batches import run_datasets, training_batches, validation_reader
from megatron_step.training.evaluation import evaluation_hook
from megatron_step.training.gradients import gradient_check_hook
from megatron_step.training.logging import logging_hook
from megatron_step.training.saving import check_resumable, description, saving_hook
from megatron_step.training.signals import StopRequest, stop_requests
from megatron_step.training.stage import train_stage
from megatron_step.training.state import TrainState, initial_state


def run(config: RunConfig, stop: StopRequest | None = None) -> bool:
    """Train as `config` says; whether training got to its end, or was asked to stop before.

    `stop` is the caller's watch for signals that ask for it; without one, the run has its own.

    Raises ValueError, FileNotFoundError or OSError for input that cannot be used, before anything is written, and
    NonFiniteError or SaveError where training cannot go on.
    """
    if stop is None:
        with stop_requests() as own:
            return run(config, own)
    if config.logging.wandb is not None and find_spec("wandb") is None:
        raise ValueError("logging.wandb is set, but wandb is not installed: pip install wandb")
    start_world()
    check_world(config, torch.distributed.get_world_size())
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = run_vocab_size(config, tokenizer)
    with parallel_layout(config.parallel, config.training.seed) as parallel:
        datasets = run_datasets(config, tokenizer, parallel)
        fingerprint = data_fingerprint(
            config.data, tokenizer, config.model.seq_length, consumed_samples(config.training, config.stages.steps)
        )
        found = _find(config, parallel)
        if found is not None:
            check_resumable(found.manifest, config, vocab_size, fingerprint)
        state = _load_or_initialize(config, vocab_size, found, parallel)
        _write_config(config, parallel)
        if found is not None and config.checkpoint.resume != "auto":
            _set_aside_later(config, found, parallel)
        saver = CheckpointSaver(Path(config.output_dir) / "checkpoints", config.checkpoint, parallel)
        describe = description(config, vocab_size, fingerprint, parallel)
        with ExitStack() as stack:
            log = stack.enter_context(logging_hook(config, vocab_size, parallel, state.step))
            stream = stack.enter_context(training_batches(datasets, config, parallel, state.step))
            hooks = [gradient_check_hook(parallel), log, saving_hook(saver, config, describe, parallel)]
            if config.data.has_validation and config.evaluation.steps:
                hooks.insert(1, evaluation_hook(validation_reader(datasets, config, parallel), config, parallel))
            finished = train_stage(state, stream, config, parallel, hooks, stop)
    stop_world()
    return finished


def run_vocab_size(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Tokens of the model's vocabulary; raises ValueError if they are fewer than the tokenizer's."""
    size = tokenizer.vocab_size if config.model.vocab_size is None else config.model.vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size {size} is smaller than the {tokenizer.vocab_size} tokens of {config.data.tokenizer}: "
            "set it to null to take the tokenizer's"
        )
    return size


def _find(config: RunConfig, parallel: Parallel) -> FoundCheckpoint | None:
    folder = Path(config.output_dir) / "checkpoints"
    found = find_checkpoint(folder, config.checkpoint.resume, parallel)
    if found is None:
        if first_problem(str(folder) if list_checkpoints(folder) else None):
            raise ValueError(
                f"{folder} holds the checkpoints of another run, which a fresh start would replace: "
                "go on with --resume auto or choose another output_dir"
            )
        return None
    if parallel.is_main:
        for problem in found.passed_over:
            print(f"warning: passed over a damaged checkpoint: {problem}", flush=True)
        finished = found.manifest.step == config.stages.steps
        print(f"{found.path} is the end of the run" if finished else f"resuming from {found.path}", flush=True)
    return found


def _load_or_initialize(
    config: RunConfig, vocab_size: int, found: FoundCheckpoint | None, parallel: Parallel
) -> TrainState:
    state = initial_state(config, vocab_size, parallel)
    if found is not None:
        load_checkpoint(found, state.chunks, state.optimizer, config.training.precision, parallel)
        state.step = found.manifest.step
    return state


def _set_aside_later(config: RunConfig, found: FoundCheckpoint, parallel: Parallel) -> None:
    """Where the user chose the checkpoint: keep later ones under names that `--resume auto` does not take."""
    if parallel.is_main:
        for path in set_aside(Path(config.output_dir) / "checkpoints", found.manifest.step):
            print(f"kept a later checkpoint, which no longer counts, as {path}", flush=True)
    torch.distributed.barrier()


def _write_config(config: RunConfig, parallel: Parallel) -> None:
    if parallel.is_main:
        path = Path(config.output_dir) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(config_text(config), encoding="utf-8")
        os.replace(partial, path)
    torch.distributed.barrier()

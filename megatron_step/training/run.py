"""A run from its config to its last checkpoint."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch

from megatron_step.checkpoint.directory import list_checkpoints, set_aside
from megatron_step.checkpoint.load import FoundCheckpoint, find_checkpoint
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.load import config_text
from megatron_step.config.plugins import import_plugins, plugin_list
from megatron_step.config.run import RunConfig, check_world, consumed_samples
from megatron_step.data.fingerprint import data_fingerprint
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer
from megatron_step.engine.files import atomic_write
from megatron_step.engine.host_memory import keep_freed_memory
from megatron_step.engine.parallel import Parallel, first_problem, parallel_layout, start_world, stop_world
from megatron_step.plan.stages import StagePlan, plan_from_dict
from megatron_step.planner.forecast import Forecast, plan_and_forecast
from megatron_step.planner.lengths import length_warnings
from megatron_step.planner.table import stage_table
from megatron_step.training.batches import data_warnings, run_datasets, training_batches, validation_reader
from megatron_step.training.entry import first_state, next_stage
from megatron_step.training.hooks.evaluation import evaluation_hook
from megatron_step.training.hooks.gradients import gradient_check_hook
from megatron_step.training.hooks.logging import logging_hook
from megatron_step.training.hooks.restart import restart_hook
from megatron_step.training.hooks.saving import check_resumable, description, saving_hook
from megatron_step.training.messages import say
from megatron_step.training.signals import StopRequest, stop_requests
from megatron_step.training.stage import Hook, train_stage
from megatron_step.training.state import TrainState
from megatron_step.training.step import Microbatch
from megatron_step.training.summary import stage_summary
from megatron_step.training.trackers.tracker import MakeTracker


def run(
    config: RunConfig,
    stop: StopRequest | None = None,
    hooks: Sequence[Hook] = (),
    trackers: Sequence[MakeTracker] = (),
) -> bool:
    """Train as `config` says; whether training got to its end, or was asked to stop before.

    `stop` is the caller's watch for signals that ask for it; without one, the run has its own. `hooks` are called after
    those of the config and before the trackers, so that they may add to the metrics; `trackers` get every step's.

    Raises ValueError, FileNotFoundError or OSError for input that cannot be used, before anything is written, and
    NonFiniteError or SaveError where training cannot go on.
    """
    if stop is None:
        with stop_requests() as own:
            return run(config, own, hooks, trackers)
    plugins = import_plugins(config.plugins)
    hooks = [*hooks, *plugin_list(plugins, "hooks")]
    trackers = [*trackers, *plugin_list(plugins, "trackers")]
    if config.logging.wandb is not None and find_spec("wandb") is None:
        raise ValueError("logging.wandb is set, but wandb is not installed: pip install wandb")
    start_world()
    check_world(config, torch.distributed.get_world_size())
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = run_vocab_size(config, tokenizer)
    with parallel_layout(config.parallel, config.training.seed) as parallel:
        found = _find(config, parallel)
        planned = _plan(config, vocab_size, found, parallel)
        plan = planned.plan
        datasets = run_datasets(config, plan.num_steps, tokenizer, parallel)
        fingerprint = data_fingerprint(
            config.data, tokenizer, config.model.seq_length, consumed_samples(config.training, plan.num_steps)
        )
        if found is not None:
            check_resumable(found.manifest, config, plan, vocab_size, fingerprint)
            _announce(found, plan, parallel)
        elif parallel.is_main and len(plan.stages) > 1:
            say(stage_table(planned))
        if parallel.is_main:
            for warning in [*length_warnings(config, plan), *data_warnings(config)]:
                say(f"warning: {warning}")
        state = first_state(config, plan, found, tokenizer, vocab_size, parallel)
        _write_config(config, planned, parallel)
        if found is not None and config.checkpoint.resume != "auto":
            _set_aside_later(config, found, parallel)
        describe = description(config, plan, vocab_size, fingerprint, parallel)
        saver = CheckpointSaver(Path(config.output_dir) / "checkpoints", config.checkpoint, parallel)
        with ExitStack() as stack:
            log = stack.enter_context(logging_hook(config, plan, vocab_size, parallel, state.step, trackers))
            steps = range(state.step, plan.num_steps)
            batches = stack.enter_context(training_batches(datasets, config, parallel, steps))
            called = [gradient_check_hook(parallel)]
            if config.data.has_validation and config.evaluation.steps:
                read_batch = validation_reader(datasets, config, parallel)
                called.append(evaluation_hook(read_batch, config, parallel))
            called += [restart_hook(config, parallel), *hooks, log]
            called.append(saving_hook(saver, config, describe, parallel))

            def grow(state: TrainState) -> TrainState:
                return next_stage(state, config, plan, vocab_size, parallel)

            stack.enter_context(keep_freed_memory())
            finished = train_stages(state, plan, batches, config, parallel, called, stop, grow)
    stop_world()
    return finished


def train_stages(
    state: TrainState,
    plan: StagePlan,
    batches: Iterator[list[Microbatch]],
    config: RunConfig,
    parallel: Parallel,
    hooks: list[Hook],
    stop: StopRequest,
    grow: Callable[[TrainState], TrainState],
) -> bool:
    """Train from `state` to the end of the last stage, growing in between; whether it got there."""
    while True:
        summary = stage_summary(state, plan, config, parallel)
        if parallel.is_main:
            say(summary)
        of_stage = islice(batches, state.stage.last_step - state.step)
        if not train_stage(state, of_stage, config, parallel, hooks, stop):
            return False
        if state.stage.index == plan.stages[-1].index:
            return True
        state = grow(state)


def _plan(config: RunConfig, vocab_size: int, found: FoundCheckpoint | None, parallel: Parallel) -> Forecast:
    """The plan of the run, made by one rank for all; the layers that a planner chose when it began stay as they are.

    Raises ValueError if there is none, or it does not fit the machines.
    """
    planned: list[Forecast | None] = [None]
    problem = None
    if parallel.is_main:
        try:
            chosen = None
            if found is not None:
                chosen = [stage.num_new_layers for stage in plan_from_dict(found.manifest.plan).stages]
                # Another number of stages is refused once both plans are there.
                chosen = chosen if len(chosen) == config.stages.count else None
            planned = [plan_and_forecast(config, vocab_size, parallel.dp_size, chosen)]
        except (ValueError, RuntimeError) as error:
            problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise ValueError(problem)
    torch.distributed.broadcast_object_list(planned)
    assert planned[0] is not None
    return planned[0]


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
    return found


def _announce(found: FoundCheckpoint, plan: StagePlan, parallel: Parallel) -> None:
    if parallel.is_main:
        for problem in found.passed_over:
            say(f"warning: passed over a damaged checkpoint: {problem}")
        finished = found.manifest.step == plan.num_steps
        say(f"{found.path} is the end of the run" if finished else f"resuming from {found.path}")


def _set_aside_later(config: RunConfig, found: FoundCheckpoint, parallel: Parallel) -> None:
    """Where the user chose the checkpoint: keep later ones under names that `--resume auto` does not take."""
    if parallel.is_main:
        for path in set_aside(Path(config.output_dir) / "checkpoints", found.manifest.step):
            say(f"kept a later checkpoint, which no longer counts, as {path}")
    torch.distributed.barrier()


def _write_config(config: RunConfig, planned: Forecast, parallel: Parallel) -> None:
    if parallel.is_main:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "config.yaml", config_text(config))
        atomic_write(folder / "plan.json", json.dumps(planned.to_dict(), indent=1))
    torch.distributed.barrier()

"""A run from its config to its last checkpoint."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from megatron_step.checkpoint.directory import list_checkpoints, set_aside
from megatron_step.checkpoint.load import FoundCheckpoint, find_checkpoint
from megatron_step.checkpoint.manifest import saved_recipe
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.counts import counted
from megatron_step.config.load import config_text
from megatron_step.config.plugins import import_plugins, plugin_list
from megatron_step.config.presets import preset_line
from megatron_step.config.run import RunConfig, check_world, consumed_samples
from megatron_step.data.fingerprint import data_fingerprint
from megatron_step.data.tokenizer import Tokenizer, end_of_document_line, load_tokenizer
from megatron_step.engine.agreement import Ranks
from megatron_step.engine.files import atomic_write
from megatron_step.engine.host_memory import keep_freed_memory
from megatron_step.engine.messages import say, warn
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.engine.signals import Stopped, StopRequest, stop_requests
from megatron_step.engine.world import open_world
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import StagePlan, plan_from_dict
from megatron_step.plan.states import Recipe, training_recipe
from megatron_step.planner.forecast import Forecast, plan_and_forecast
from megatron_step.planner.lengths import length_warnings
from megatron_step.report.plan_table import stage_table
from megatron_step.training.batches import data_warnings, run_datasets, training_batches, validation_reader
from megatron_step.training.entry import first_state, next_stage
from megatron_step.training.hooks.evaluation import evaluation_hook
from megatron_step.training.hooks.gradients import gradient_check_hook
from megatron_step.training.hooks.logging import logging_hook
from megatron_step.training.hooks.old_layers import old_layers_hook
from megatron_step.training.hooks.saving import check_resumable, description, saving_hook
from megatron_step.training.output_folder import output_folder
from megatron_step.training.rank_facts import ADVICE, rank_facts
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
    """Train with `config`. Return True if training reached its end, False if it was asked to stop before.

    `stop` watches for signals that ask the run to stop; None makes a new watch. `hooks` are called after the config's
    own hooks and before the trackers, so they may add to the metrics. `trackers` get the metrics of every step.

    Raises ValueError, FileNotFoundError or OSError for unusable input, before anything is written. Raises
    NonFiniteError or SaveError if training cannot go on.
    """
    if stop is None:
        with stop_requests() as own:
            return run(config, own, hooks, trackers)
    try:
        with open_world() as ranks:
            finished = _run(config, stop, hooks, trackers, ranks)
    except Stopped as stopped:
        if not getattr(stopped, "is_told", False):
            warn(f"{stopped}: nothing was changed")
        return False
    stop_world()
    return finished


def _run(
    config: RunConfig, stop: StopRequest, hooks: Sequence[Hook], trackers: Sequence[MakeTracker], ranks: Ranks
) -> bool:
    """Run as one of the ranks of the world."""
    with ranks.together():
        plugins = import_plugins(config.plugins)
        hooks = [*hooks, *plugin_list(plugins, "hooks")]
        trackers = [*trackers, *plugin_list(plugins, "trackers")]
        if config.logging.wandb is not None and find_spec("wandb") is None:
            raise ValueError("logging.wandb is set, but wandb is not installed: pip install wandb")
        check_world(config, ranks.size)
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
        vocab_size = run_vocab_size(config, tokenizer)
        facts = rank_facts(config, data_fingerprint(config.data, tokenizer, config.model.seq_length, 0))
    ranks.agree(facts, ADVICE)
    with (
        output_folder(Path(config.output_dir), ranks, stop),
        parallel_layout(config.parallel, config.training.seed) as parallel,
    ):
        found = _find(config, ranks, parallel)
        planned = ranks.from_main(lambda: _plan(config, vocab_size, found, parallel))
        plan = planned.plan
        datasets = run_datasets(config, plan.num_steps, tokenizer, parallel)
        fingerprint = data_fingerprint(
            config.data, tokenizer, config.model.seq_length, consumed_samples(config.training, plan.num_steps)
        )
        if found is not None:
            check_resumable(found.manifest, config, plan, vocab_size, fingerprint)
            _announce(found, plan, training_recipe(config), parallel)
        elif parallel.is_main and len(plan.stages) > 1:
            say(stage_table(planned))
        if parallel.is_main:
            _introduce(config, plan, tokenizer)
        state = first_state(config, plan, found, tokenizer, vocab_size, parallel)
        ranks.from_main(lambda: _write_config(config, planned))
        if found is not None and config.checkpoint.resume != "auto":
            ranks.from_main(lambda: _set_aside_later(config, found))
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
            called += [old_layers_hook(config, parallel), *hooks, log]
            saving_bytes = [max(rank.host.save_bytes for rank in stage.ranks) for stage in planned.stages]
            called.append(saving_hook(saver, config, describe, saving_bytes, parallel))

            def grow(state: TrainState) -> TrainState:
                return next_stage(state, config, plan, vocab_size, parallel)

            stack.enter_context(keep_freed_memory())
            stack.enter_context(stop.after_step())
            return train_stages(state, plan, batches, config, parallel, called, stop, grow)


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
    """Train from `state` to the end of the last stage, growing in between. Return whether the end was reached."""
    while True:
        summary = stage_summary(state, plan, config, parallel)
        if parallel.is_main:
            say(summary)
        stage_batches = islice(batches, state.stage.last_step - state.step)
        if not train_stage(state, plan, stage_batches, config, parallel, hooks, stop):
            if parallel.is_main:
                say(f"stopped after step {state.step}, which is saved: start the same command again to go on")
            return False
        if state.stage.index == plan.stages[-1].index:
            return True
        state = grow(state)


def _plan(config: RunConfig, vocab_size: int, found: FoundCheckpoint | None, parallel: Parallel) -> Forecast:
    """Return the plan of the run. A resumed run keeps the layers that were chosen when it began.

    Raises ValueError if no plan is possible, or if none fits the machines.
    """
    chosen = None
    if found is not None:
        chosen = [stage.num_new_layers for stage in plan_from_dict(found.manifest.plan).stages]
        # A checkpoint with another number of stages is rejected later, when the two plans are compared.
        chosen = chosen if len(chosen) == config.stages.count else None
    try:
        return plan_and_forecast(resolve(config, vocab_size, parallel.dp_size), chosen)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def run_vocab_size(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Return the number of tokens in the model's vocabulary; raise ValueError if the tokenizer has more."""
    size = tokenizer.vocab_size if config.model.vocab_size is None else config.model.vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size {size} is smaller than the {counted(tokenizer.vocab_size, 'token')} of "
            f"{config.data.tokenizer}: set it to null to take the tokenizer's"
        )
    return size


def _find(config: RunConfig, ranks: Ranks, parallel: Parallel) -> FoundCheckpoint | None:
    folder = Path(config.output_dir) / "checkpoints"
    found = find_checkpoint(folder, config.checkpoint.resume, parallel)
    with ranks.together():
        if found is None and list_checkpoints(folder):
            raise ValueError(
                f"{folder} holds the checkpoints of another run, which a fresh start would replace: "
                "go on with that run by --resume auto, or choose another output_dir"
            )
    return found


def _announce(found: FoundCheckpoint, plan: StagePlan, recipe: Recipe, parallel: Parallel) -> None:
    if parallel.is_main:
        for problem in found.passed_over:
            say(f"warning: skipped a damaged checkpoint: {problem}")
        finished = found.manifest.step == plan.num_steps
        say(f"the run is finished: {found.path} is its last checkpoint" if finished else f"resuming from {found.path}")
        rounded = recipe.rounds(saved_recipe(found.manifest))
        if rounded:
            say(f"warning: optimizer.states differ from the checkpoint's: {rounded}")


def _introduce(config: RunConfig, plan: StagePlan, tokenizer: Tokenizer) -> None:
    """Say what the run makes of its config, and what may not be meant."""
    if config.preset is not None:
        say(preset_line(config.preset, config))
    say(end_of_document_line(tokenizer))
    for warning in [*length_warnings(config, plan), *data_warnings(config)]:
        say(f"warning: {warning}")


def _set_aside_later(config: RunConfig, found: FoundCheckpoint) -> None:
    """Rename checkpoints after the one that the user chose, so that `--resume auto` does not take them."""
    for path in set_aside(Path(config.output_dir) / "checkpoints", found.manifest.step):
        say(f"renamed a later checkpoint to {path}: the run goes on from the earlier one")


def _write_config(config: RunConfig, planned: Forecast) -> None:
    folder = Path(config.output_dir)
    atomic_write(folder / "config.yaml", config_text(config))
    atomic_write(folder / "plan.json", json.dumps(planned.to_dict(), indent=1))

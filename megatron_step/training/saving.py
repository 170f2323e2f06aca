"""Checkpoints as a hook of the training loop, and what a resumed run must share with the one that saved."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from megatron_step.checkpoint.manifest import Manifest
from megatron_step.checkpoint.save import CheckpointSaver, SaveError
from megatron_step.config.run import RunConfig, consumed_samples
from megatron_step.data.fingerprint import check_fingerprint
from megatron_step.engine.parallel import Parallel
from megatron_step.training.stage import Hook, StepContext


def saving_hook(
    saver: CheckpointSaver, config: RunConfig, describe: Callable[[int], dict[str, Any]], parallel: Parallel
) -> Hook:
    """A hook that saves every `checkpoint.interval` steps, and at the end of training.

    A save in between that fails is reported and training goes on; the last one raises SaveError.
    """
    interval = config.checkpoint.interval

    def hook(context: StepContext) -> None:
        state = context.state
        due = context.is_last or (interval and state.step % interval == 0)
        try:
            saver.finish() if due else saver.poll()
        except SaveError as error:
            _warn(error, parallel)  # of the checkpoint before: this step's may succeed
        if not due:
            return
        try:
            saver.save(state.chunks, state.optimizer, config.training.precision, state.step, describe(state.step))
            if context.is_last:
                saver.finish()
        except SaveError as error:
            if context.is_last:
                raise
            _warn(error, parallel)

    return hook


def _warn(error: SaveError, parallel: Parallel) -> None:
    if parallel.is_main:
        print(f"warning: {error}; training goes on, earlier checkpoints are untouched", file=sys.stderr, flush=True)


def description(
    config: RunConfig, vocab_size: int, fingerprint: dict[str, Any], parallel: Parallel
) -> Callable[[int], dict[str, Any]]:
    """What the manifest of a checkpoint says beside its tensors, as a function of the step."""
    layout = {
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel.pipeline_parallel_size,
        "virtual_pipeline_size": config.parallel.virtual_pipeline_size,
        "data_parallel_size": parallel.dp_size,
    }
    return lambda step: {
        "consumed_samples": consumed_samples(config.training, step),
        "vocab_size": vocab_size,
        "config": asdict(config),
        "data_fingerprint": fingerprint,
        "layout": layout,
    }


def check_resumable(manifest: Manifest, config: RunConfig, vocab_size: int, fingerprint: dict[str, Any]) -> None:
    """Raise ValueError, naming each difference, if this run cannot go on from a checkpoint exactly where it stopped."""
    saved, current = manifest.config, asdict(config)
    differences = [
        f"{section}.{key} {saved[section].get(key)} -> {value}"
        for section, keys in _FIXED.items()
        for key, value in current[section].items()
        if (keys is None or key in keys) and saved[section].get(key) != value
    ]
    if manifest.vocab_size != vocab_size:
        differences.append(f"vocabulary {manifest.vocab_size} -> {vocab_size}")
    if differences:
        raise ValueError(
            f"the checkpoint of step {manifest.step} is of another run: {', '.join(differences)}; "
            "restore these keys to go on, or choose another output_dir to start anew"
        )
    if manifest.step > config.stages.steps:
        raise ValueError(
            f"the checkpoint is of step {manifest.step}, beyond stages.steps {config.stages.steps}: nothing is left"
        )
    check_fingerprint(manifest.data_fingerprint, fingerprint)


_FIXED: dict[str, set[str] | None] = {
    "model": None,
    "training": {"global_batch_size", "ramp_up", "precision"},
}
"""Keys of the config, by section, that follow a run through all its processes; None for the whole section."""

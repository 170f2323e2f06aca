"""Checkpoints as a hook of the training loop, and the check that a resumed run continues the run that saved."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

from megatron_step.checkpoint.manifest import Manifest
from megatron_step.checkpoint.save import CheckpointSaver, SaveError
from megatron_step.config.run import RunConfig, consumed_samples
from megatron_step.config.stages import old_layer_policy
from megatron_step.data.fingerprint import check_fingerprint
from megatron_step.engine.messages import say, warn
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.stages import StagePlan, plan_from_dict
from megatron_step.plan.states import training_recipe
from megatron_step.training.memory import measure_host_peak
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.state import TrainState


def saving_hook(
    saver: CheckpointSaver,
    config: RunConfig,
    describe: Callable[[TrainState], dict[str, Any]],
    planned_bytes: Sequence[int],
    parallel: Parallel,
) -> Hook:
    """Return a hook that saves every `checkpoint.interval` steps and at the end of each stage.

    If a save inside a stage fails, the hook warns and training goes on. If the save at a stage's end fails, the hook
    raises SaveError. The first save of a stage logs its time and memory. `planned_bytes` has the planned host memory
    of a save in each stage.
    """
    measured: set[int] = set()  # stages

    def hook(context: StepContext) -> None:
        state = context.state
        due = context.is_last or context.is_due(config.checkpoint.interval)
        try:
            saver.finish() if due else saver.poll()
        except SaveError as error:
            _warn(error, parallel)  # the previous save failed; this step's may succeed
        if not due:
            return
        try:
            began = perf_counter()
            written, host_bytes = measure_host_peak(
                lambda: saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, describe(state))
            )
            seconds = perf_counter() - began
            if config.checkpoint.asynchronous:
                host_bytes = max(
                    host_bytes, written
                )  # on the CPU, a fork keeps its own copy of what training changes meanwhile
            written, host_bytes = _largest([written, host_bytes], parallel)
            planned = planned_bytes[state.stage.index]
            state.save_memory = {"save_host_bytes": host_bytes, "planned_save_host_bytes": planned}
            if state.stage.index not in measured and parallel.is_main:
                say(_took(state.step, seconds, written, host_bytes, planned))
            measured.add(state.stage.index)
            if context.is_last:
                saver.finish()
        except SaveError as error:
            if context.is_last:
                raise
            _warn(error, parallel)

    return hook


def _largest(numbers: Sequence[int], parallel: Parallel) -> list[int]:
    """Return the largest value of each number over all ranks."""
    found = torch.tensor(numbers, dtype=torch.int64, device=parallel.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.tolist()


def _took(step: int, seconds: float, written: int, host_bytes: int, planned: int) -> str:
    """Return a line with the time and memory of a save."""
    mib = [f"{number / 2**20:,.1f}" for number in (written, planned, host_bytes)]
    return (
        f"checkpoint of step {step}: {seconds:.1f} s, at most {mib[0]} MiB written by a rank; "
        f"host memory in MiB, planned / measured: {mib[1]} / {mib[2]}"
    )


def _warn(error: SaveError, parallel: Parallel) -> None:
    if parallel.is_main:
        warn(f"{error}; training goes on, earlier checkpoints are untouched")


def description(
    config: RunConfig, plan: StagePlan, vocab_size: int, fingerprint: dict[str, Any], parallel: Parallel
) -> Callable[[TrainState], dict[str, Any]]:
    """Return a function that describes a state for the manifest of its checkpoint."""
    layout = {
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel.pipeline_parallel_size,
        "virtual_pipeline_size": config.parallel.virtual_pipeline_size,
        "data_parallel_size": parallel.dp_size,
    }
    return lambda state: {
        "stage_index": state.stage.index,
        "consumed_samples": consumed_samples(config.training, state.step),
        "vocab_size": vocab_size,
        "config": asdict(config),
        "plan": plan.to_dict(),
        "data_fingerprint": fingerprint,
        "layout": layout,
        "kept_settings": state.kept_settings,
    }


def check_resumable(
    manifest: Manifest, config: RunConfig, plan: StagePlan, vocab_size: int, fingerprint: dict[str, Any]
) -> None:
    """Raise ValueError, naming each difference, if this run cannot continue exactly from a checkpoint."""
    saved, current = manifest.config, asdict(config)
    differences = [
        f"{section}.{key} {saved[section].get(key)} -> {value}"
        for section, keys in _FIXED.items()
        for key, value in current[section].items()
        if (keys is None or key in keys) and saved[section].get(key) != value
    ]
    if manifest.vocab_size != vocab_size:
        differences.append(f"vocabulary {manifest.vocab_size} -> {vocab_size}")
    saved_policy = old_layer_policy(
        saved.get("old_layers", {}).get("policy"), saved["freeze"]["layers"], saved["adapter"]["rank"]
    )
    if saved_policy != config.old_layer_policy:
        differences.append(f"old_layers.policy {saved_policy} -> {config.old_layer_policy}")
    saved_rule = saved["optimizer"].get("rule", "adamw")  # checkpoints of earlier versions lack the key
    if saved_rule != config.optimizer.rule:
        differences.append(f"optimizer.rule {saved_rule} -> {config.optimizer.rule}")
    differences += _rotation_differences(saved, config)
    differences += _plan_differences(plan_from_dict(manifest.plan), plan)
    if differences:
        raise ValueError(
            f"the checkpoint of step {manifest.step} was saved with other settings: {', '.join(differences)}. "
            "Restore these keys to go on, or choose another output_dir to start a new run"
        )
    check_fingerprint(manifest.data_fingerprint, fingerprint)


_FIXED: dict[str, set[str] | None] = {
    "model": None,
    "training": {"global_batch_size", "ramp_up", "precision"},
    "growth": None,
    "freeze": None,
    "adapter": None,
}
"""Keys of the config, by section, that must stay the same when a run is resumed; None for the whole section."""


def _rotation_differences(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """Return how the layers that a rotation trains in each turn would differ. Other policies have no such keys."""
    if config.old_layer_policy != "rotate":
        return []
    earlier, current = saved.get("old_layers", {}), asdict(config.old_layers)
    found = [
        f"old_layers.{key} {earlier.get(key)} -> {value}"
        for key, value in current.items()
        if key != "policy" and earlier.get(key) != value
    ]
    seed = saved["training"]["seed"]
    if config.old_layers.order == "random" and seed != config.training.seed:
        found.append(f"training.seed {seed} -> {config.training.seed}")
    return found


def _plan_differences(saved: StagePlan, plan: StagePlan) -> list[str]:
    """Return how the stages of two plans differ. Layouts may change, so they are left out."""
    if len(saved.stages) != len(plan.stages):
        return [f"stages.count {len(saved.stages)} -> {len(plan.stages)}"]
    found = []
    for old, new in zip(saved.stages, plan.stages):
        if old.num_new_layers != new.num_new_layers:
            found.append(f"new layers of stage {new.number} {old.num_new_layers} -> {new.num_new_layers}")
        elif old.layers != new.layers:
            found.append(f"place or sources of the layers of stage {new.number}")
        if (old.last_step, old.schedule_steps) != (new.last_step, new.schedule_steps):
            found.append(f"last step of stage {new.number} {old.last_step} -> {new.last_step}")
    return found

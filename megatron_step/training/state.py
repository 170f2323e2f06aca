"""The state of a run in training: a stage's model, its optimizer, and the steps done."""

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module

from megatron_step.adapters.attach import attach_adapters
from megatron_step.adapters.freeze import apply_treatment, mark_weights
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import build_model, sharded_weights
from megatron_step.model.gpt import GPTModel
from megatron_step.optim.optimizer import (
    build_optimizer,
    set_update_counts,
    unwrap_data_parallel,
    wrap_data_parallel,
)
from megatron_step.optim.resting import rest
from megatron_step.plan.old_layers import adapter_targets, turn_at
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import Stage, StagePlan
from megatron_step.plan.states import training_recipe
from megatron_step.plan.trainable import treatment, updates
from megatron_step.planner.plan import make_plan


@dataclass
class TrainState:
    """Weights, optimizer and position of a run; what a checkpoint holds."""

    step: int
    """Finished optimizer steps; the position in the data follows from it."""
    stage: Stage
    """The growth stage that the model has."""
    chunks: list[DistributedDataParallel]
    """This rank's model chunks, one for each virtual pipeline rank."""
    optimizer: MegatronOptimizer | None
    """The optimizer over the trainable weights of the chunks; None after `release`."""
    plan: StagePlan
    """All stages of the run."""
    kept_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the Hugging Face model that the weights were imported from; see `Manifest`."""
    growth_peak_bytes: int | None = None
    """Peak bytes on this rank while the model grew; None if this process did not grow it."""

    save_memory: dict[str, int] = field(default_factory=dict)
    """Measured and planned host memory of the last save, in bytes; the largest over ranks."""

    def release(self) -> None:
        """Let go of weights, gradients and optimizer states, so that a larger model can take their place."""
        self.chunks.clear()
        self.optimizer = None
        gc.collect()  # wrappers and hooks are in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def initial_state(config: RunConfig, vocab_size: int, parallel: Parallel) -> TrainState:
    """Build the first stage's model with initial weights and its optimizer, before the first step."""
    plan = make_plan(resolve(config, vocab_size))
    return build_state(config, plan, plan.stages[0], 0, vocab_size, parallel)


def build_state(
    config: RunConfig, plan: StagePlan, stage: Stage, step: int, vocab_size: int, parallel: Parallel
) -> TrainState:
    """Build a stage's model with initial weights and its optimizer with zero moments, after `step` steps of the run."""
    chunks = build_stage_model(config, stage, step, vocab_size, parallel)
    return make_trainable(chunks, config, plan, stage, step, parallel)


def build_stage_model(
    config: RunConfig, stage: Stage, step: int, vocab_size: int, parallel: Parallel
) -> list[GPTModel | Float16Module]:
    """Build this rank's model chunks of a stage: initial weights, fresh adapters, no gradients or optimizer states.

    The stage trains the same weights as after `step` finished steps of the run.

    Load or grow weights into the chunks before `make_trainable`, while optimizer states are not yet in memory.
    """
    precision, seed, turn = config.training.precision, config.training.seed, turn_at(step, stage, config)
    chunks = build_model(config.model, vocab_size, parallel, precision, seed, stage.layout)
    for chunk in chunks:
        attach_adapters(
            chunk, config.model, config.adapter, lambda layer: adapter_targets(layer, stage, config), parallel, seed
        )
        apply_treatment(chunk, lambda key: treatment(key, stage, config, turn), parallel)
    return chunks


def make_trainable(
    chunks: list[GPTModel | Float16Module],
    config: RunConfig,
    plan: StagePlan,
    stage: Stage,
    step: int,
    parallel: Parallel,
) -> TrainState:
    """Give the chunks of `build_stage_model` gradient buffers and an optimizer with zero moments.

    Main weights are copies of the chunks' present weights. The run has finished `step` steps. Adam counts the updates
    that the plan gives each weight until then. Resting weights that have no states get zero moments on the host.
    """
    recipe, stages = training_recipe(config), plan.stages[: stage.index + 1]
    for shard in sharded_weights(chunks, parallel).values():
        if shard.data.requires_grad:
            shard.data.updates = updates(shard.key, stages, config, step)
        elif shard.data.rests and getattr(shard.data, "resting", None) is None:
            rest(shard, recipe, parallel)
    wrapped = wrap_data_parallel(chunks, recipe, parallel)
    optimizer = build_optimizer(config.optimizer, config.model, wrapped, recipe, parallel, config.training.seed)
    set_update_counts(optimizer)
    return TrainState(step=step, stage=stage, chunks=wrapped, optimizer=optimizer, plan=plan)


def next_turn(state: TrainState, config: RunConfig, parallel: Parallel) -> None:
    """Give the weights that the state's step trains gradient buffers and an optimizer with zero moments, in place.

    The weights stay as they are, and so do the states of weights that rest. All else of the optimizer is lost.
    """
    state.optimizer = None
    bare = unwrap_data_parallel(state.chunks)
    state.release()
    turn = turn_at(state.step, state.stage, config)
    for chunk in bare:
        mark_weights(chunk, lambda key: treatment(key, state.stage, config, turn), parallel)
    changed = make_trainable(bare, config, state.plan, state.stage, state.step, parallel)
    state.chunks, state.optimizer = changed.chunks, changed.optimizer

"""Freezes what a stage does not train: no gradient buffer, no optimizer state, no weight-gradient product."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import Float16Module

from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import sharded_state
from megatron_step.model.gpt import GPTModel
from megatron_step.plan.old_layers import Treatment


def apply_treatment(
    chunk: GPTModel | Float16Module, treatment_of: Callable[[str], Treatment], parallel: Parallel
) -> None:
    """Freeze the weights of a chunk that was just built, or mark them for the optimizer, as `mark_weights` does."""
    mark_weights(chunk, treatment_of, parallel)
    model = chunk.module if isinstance(chunk, Float16Module) else chunk
    if model.pre_process and model.config.recompute_granularity == "full":
        # A recomputed layer whose input needs no gradient is never run backward, and its weights get none, silently.
        model.embedding.register_forward_hook(_require_gradient)


def mark_weights(chunk: GPTModel | Float16Module, treatment_of: Callable[[str], Treatment], parallel: Parallel) -> None:
    """Freeze the chunk's weights, or mark them for the optimizer (`role`, `since`, `rests`), by their keys' treatment.

    In place, before the data-parallel wrapper and the optimizer fix what is trained.
    """
    for shard in sharded_state(chunk, parallel).values():
        if isinstance(shard, (ShardedTensor, ShardedTensorFactory)):
            decided = treatment_of(shard.key)
            shard.data.requires_grad_(decided.trained)
            shard.data.role, shard.data.since, shard.data.rests = decided.role, decided.since, decided.rests


def _require_gradient(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()

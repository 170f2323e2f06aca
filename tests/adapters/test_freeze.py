"""Frozen weights have no gradient buffer and no optimizer state, and do not block the gradients of other weights."""

from dataclasses import replace
from typing import Any

import pytest
from serial_oracle import state_of
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.adapters.freeze import mark_weights
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import build_model
from megatron_step.plan.old_layers import Treatment
from megatron_step.training.hooks.gradients import weights_without_gradient
from megatron_step.training.step import train_step

STAGES: dict[str, Any] = {"count": 2, "layers": [3, 1]}


@pytest.mark.parametrize("distributed", [False, True])
def test_frozen_weights_have_neither_gradient_nor_state(alone: Parallel, distributed: bool) -> None:
    config = small_config(stages=STAGES, parallel={"distributed_optimizer": distributed})
    state = state_of(config, 1, replace(alone, config=config.parallel))
    chunk = state.chunks[0]
    frozen = [param for param in chunk.parameters() if not param.requires_grad]
    trained = [param for param in chunk.parameters() if param.requires_grad]
    assert len(frozen) == 3 * 4, "the four matrices of each old layer"
    assert all(not hasattr(param, "main_grad") for param in frozen)
    elements = sum(param.numel() for param in trained)
    assert sum(buffer.numel_unpadded for buffer in chunk.buffers) == elements
    (part,) = state.optimizer.chained_optimizers
    assert sum(moments["exp_avg"].numel() for moments in part.optimizer.state.values()) == elements


def test_groups_know_role_and_updates(alone: Parallel) -> None:
    state = state_of(small_config(stages=STAGES), 1, alone)
    kinds = {(group["role"], group["updates"]) for group in state.optimizer.param_groups}
    assert kinds == {("embedding", state.step), ("base", state.step), ("new_layer", 0), ("adapter", 0)}


def test_a_mark_freezes_and_trains_again(alone: Parallel) -> None:
    config = small_config()
    (chunk,) = build_model(config.model, VOCAB_SIZE, alone, "fp32", seed=1)
    for trained in (False, True):
        mark_weights(chunk, lambda key: Treatment(trained, "base", 3, rests=not trained), alone)  # noqa: B023
        for param in chunk.parameters():
            assert (param.requires_grad, param.since, param.rests) == (trained, 3, not trained)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_frozen_embedding_does_not_stop_gradients(alone: Parallel, recompute: str) -> None:
    """A recomputed layer whose input needs no gradient is never run backward."""
    freeze = {"embedding": True, "norms": True}
    config = small_config(stages={"count": 2, "layers": [4, 0]}, freeze=freeze, parallel={"recompute": recompute})
    parallel = replace(alone, config=config.parallel)
    state = state_of(config, 1, parallel)
    for step in range(2):  # in the first, B is zero and A gets no gradient
        result = train_step(state, made_up_batch(config, step, parallel), 1e-2, config, parallel, False)
        assert result.grad_norm > 0
    assert weights_without_gradient(state, parallel) == []

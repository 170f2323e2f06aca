"""What is trainable is fixed when it is wrapped; norms and biases do not decay; moments exist from the start."""

import pytest
import torch
from small_run import TIED, VOCAB_SIZE, small_config

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import build_model
from megatron_step.optim.adam import FusedAdam
from megatron_step.optim.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel


def _optimizer(config: RunConfig, parallel: Parallel) -> tuple:
    chunks = build_model(config.model, VOCAB_SIZE, parallel, config.training.precision, seed=1)
    wrapped = wrap_data_parallel(chunks, parallel)
    return wrapped, build_optimizer(config.optimizer, wrapped, config.training.precision)


def test_norms_and_biases_do_not_decay(alone: Parallel) -> None:
    chunks, optimizer = _optimizer(small_config(model=TIED), alone)
    set_learning_rate(optimizer, 3e-4, 0.2)
    decay = {id(param): group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    (part,) = optimizer.chained_optimizers
    count = sum(param.numel() for group in part.optimizer.param_groups for param in group["params"])
    assert count == sum(param.numel() for param in chunks[0].parameters())
    decayed = sum(
        param.numel() for group in optimizer.param_groups for param in group["params"] if decay[id(param)] == 0.2
    )
    assert decayed == sum(param.numel() for param in chunks[0].parameters() if param.dim() > 1)
    assert set(decay.values()) == {0.0, 0.2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_it_needs_is_allocated_before_the_first_step(alone: Parallel, precision: str) -> None:
    chunks, optimizer = _optimizer(small_config(training={"precision": precision}), alone)
    (part,) = optimizer.chained_optimizers
    assert isinstance(part.optimizer, FusedAdam)
    weights = sum(param.numel() for param in chunks[0].parameters())
    for name in ("exp_avg", "exp_avg_sq"):
        assert sum(state[name].numel() for state in part.optimizer.state.values()) == weights
    assert all(state[name].dtype == torch.float32 for state in part.optimizer.state.values() for name in state)


def test_a_frozen_weight_has_neither_gradient_nor_state(alone: Parallel) -> None:
    config = small_config()
    (chunk,) = build_model(config.model, VOCAB_SIZE, alone, "fp32", seed=1)
    for param in chunk.decoder.layers[0].parameters():
        param.requires_grad_(False)
    wrapped = wrap_data_parallel([chunk], alone)
    optimizer = build_optimizer(config.optimizer, wrapped, "fp32")
    trainable = sum(param.numel() for param in chunk.parameters() if param.requires_grad)
    assert sum(buffer.numel_unpadded for buffer in wrapped[0].buffers) == trainable
    (part,) = optimizer.chained_optimizers
    assert sum(state["exp_avg"].numel() for state in part.optimizer.state.values()) == trainable

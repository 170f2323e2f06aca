"""Wrapping fixes the trainable weights; norms and biases do not decay; moments exist from the start."""

from dataclasses import replace

import pytest
import torch
from small_run import TIED, VOCAB_SIZE, made_up_batch, small_config
from worlds import Worlds

from megatron_step.config.optimization import OptimizerConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import build_model
from megatron_step.optim.adam import FusedAdam
from megatron_step.optim.optimizer import (
    build_optimizer,
    gradient_norm,
    set_learning_rate,
    set_update_counts,
    square_norm,
    wrap_data_parallel,
)
from megatron_step.plan.states import RECIPES, training_recipe
from megatron_step.training.state import initial_state
from megatron_step.training.step import train_step


def _optimizer(config: RunConfig, parallel: Parallel) -> tuple:
    chunks = build_model(config.model, VOCAB_SIZE, parallel, config.training.precision, seed=1)
    wrapped = wrap_data_parallel(chunks, training_recipe(config), parallel)
    return wrapped, build_optimizer(config.optimizer, config.model, wrapped, training_recipe(config), parallel, 1)


def test_norms_and_biases_do_not_decay(alone: Parallel) -> None:
    chunks, optimizer = _optimizer(small_config(model=TIED), alone)
    set_learning_rate(optimizer, 3e-4, OptimizerConfig(learning_rate=1.0, weight_decay=0.2), {})
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
    wrapped = wrap_data_parallel([chunk], RECIPES["fp32"], alone)
    optimizer = build_optimizer(config.optimizer, config.model, wrapped, RECIPES["fp32"], alone, 1)
    trainable = sum(param.numel() for param in chunk.parameters() if param.requires_grad)
    assert sum(buffer.numel_unpadded for buffer in wrapped[0].buffers) == trainable
    (part,) = optimizer.chained_optimizers
    assert sum(state["exp_avg"].numel() for state in part.optimizer.state.values()) == trainable


def test_each_role_has_its_learning_rate(alone: Parallel) -> None:
    settings = OptimizerConfig(
        learning_rate=1.0, weight_decay=0.2, embeddings_scale=0.5, new_layers_scale=2.0, adapters_scale=3.0
    )
    _, optimizer = _with_roles(alone)
    set_learning_rate(optimizer, 1e-3, settings, {})
    rates = {(group["role"], group["wd_mult"]): group["lr"] for group in optimizer.param_groups}
    scales = {"embedding": 0.5, "new_layer": 2.0, "adapter": 3.0, "base": 1.0}
    assert {role for role, _ in rates} == set(scales)
    assert all(rate == pytest.approx(1e-3 * scales[role]) for (role, _), rate in rates.items())
    assert ("new_layer", 0.0) in rates, "the norms of a new layer do not decay, but have its rate"


def test_weights_of_one_kind_are_one_group(alone: Parallel) -> None:
    (chunk,), optimizer = _with_roles(alone)
    groups = [(group["role"], group["since"], group["wd_mult"]) for group in optimizer.param_groups]
    assert len(set(groups)) == len(groups)
    for param in chunk.parameters():
        kind = (param.role, param.since, 0.0 if param.dim() == 1 else 1.0)
        (group,) = [group for group, other in zip(optimizer.param_groups, groups) if other == kind]
        assert any(param is other for other in group["params"])


def test_the_update_counts_are_those_of_the_moments_stage(alone: Parallel) -> None:
    _, optimizer = _with_roles(alone)
    set_update_counts(optimizer, {0: 40, 1: 25, 2: 7})
    assert {(group["since"], int(group["step"])) for group in optimizer.param_groups} == {(0, 40), (1, 25), (2, 7)}


@pytest.mark.parametrize("size", [1, 4096, 5000, 2**24 + 3])
@pytest.mark.parametrize("constant", [True, False])
def test_the_norm_of_a_large_gradient_is_exact(size: int, constant: bool) -> None:
    torch.manual_seed(0)
    gradient = torch.full((size,), 0.1) if constant else torch.randn(size)
    exact = gradient.double().square().sum()
    assert float(square_norm(gradient)) == pytest.approx(float(exact), rel=1e-6)
    assert float(square_norm(gradient[: size // 2]) + square_norm(gradient[size // 2 :])) == pytest.approx(
        float(exact), rel=1e-6
    )


def test_the_gradient_norm_is_that_of_all_gradients(alone: Parallel) -> None:
    _, optimizer = _with_roles(alone)
    (part,) = optimizer.chained_optimizers
    for param in part.get_parameters():
        param.grad = torch.randn(param.shape)
    squares = sum(float(param.grad.double().square().sum()) for param in part.get_parameters())
    assert gradient_norm(optimizer, alone.device) == pytest.approx(squares**0.5, rel=1e-7)


def _with_roles(parallel: Parallel) -> tuple:
    """A model with weights that the stages with index 0, 1 and 2 begin to train."""
    config = small_config()
    (chunk,) = build_model(config.model, VOCAB_SIZE, parallel, "fp32", seed=1)
    kinds = {"embedding.": ("embedding", 0), "decoder.layers.1.": ("adapter", 1), "decoder.layers.3.": ("new_layer", 2)}
    for name, param in chunk.named_parameters():
        known = (kind for prefix, kind in kinds.items() if name.startswith(prefix))
        param.role, param.since = next(known, ("base", 0))
    replicated = replace(parallel, config=replace(parallel.config, distributed_optimizer=False))
    wrapped = wrap_data_parallel([chunk], RECIPES["fp32"], replicated)
    return wrapped, build_optimizer(config.optimizer, config.model, wrapped, RECIPES["fp32"], replicated, 1)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, {"distributed_optimizer": False}), (2, {}), (2, {"pipeline_parallel_size": 2})],
    ids=["one", "DP2 distributed", "PP2"],
)
def test_every_group_counts_updates_and_can_be_set(worlds: Worlds, size: int, layout: dict) -> None:
    for counted, set_to in worlds(size).run(count_updates, config=small_config(parallel=layout)):
        assert set(counted) == {2}
        assert set(set_to) == {40}


# What the ranks run.


def count_updates(config: RunConfig) -> tuple[list[int], list[int]]:
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        for step in range(2):
            train_step(state, made_up_batch(config, step, parallel), 1e-3, config, parallel, False)
        counted = [int(group["step"]) for group in state.optimizer.param_groups]
        set_update_counts(state.optimizer, {0: 40})
        return counted, [int(group["step"]) for group in state.optimizer.param_groups]

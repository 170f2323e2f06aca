"""Muon trains whole logical matrices: as a plain reference in fp64, the same in every layout, in the planned bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_steps import LEARNING_RATE, NORM, made_up_gradient, step_with_made_up_gradients
from small_run import (
    PLAIN,
    TIED,
    VOCAB_SIZE,
    loaded_state,
    made_up_batch,
    manifest_facts,
    read_checkpoint,
    small_config,
    whole_tensors,
)
from torch import Tensor
from worlds import Worlds

from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import SECOND_MOMENT, training_recipe
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_states
from megatron_step.training.state import initial_state
from megatron_step.training.step import train_step

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
VPP2: dict[str, Any] = {**PP2, "virtual_pipeline_size": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "exact": {"states": "exact"},
    "compact": {"states": "compact"},
    "compact, bf16 momentum": {"states": "compact", "momentum_bits": 16},
    "compact 8 bits": {"states": "compact", "correction_bits": 8, "gradients": "fp32"},
    "smallest": {"states": "smallest"},
}
UPDATED: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, TP2),
    (2, VPP2),
    (2, {}),
    (2, {"distributed_optimizer": False}),
    (8, {**TP2, **PP2}),
]


def _config(recipe: dict[str, Any] | None, layout: dict[str, Any], model: dict[str, Any] = TIED) -> RunConfig:
    """A config in bf16, or in fp32 without a recipe."""
    precision = "fp32" if recipe is None else "bf16"
    optimizer = {"rule": "muon", "weight_decay": 0.1, **(recipe or {})}
    return small_config(model=model, training={"precision": precision}, optimizer=optimizer, parallel=layout)


@pytest.mark.parametrize("model", [PLAIN, {**TIED, "mlp": "gelu"}], ids=["gated", "plain"])
def test_three_steps_are_those_of_a_plain_reference(worlds: Worlds, tmp_path: Path, model: dict[str, Any]) -> None:
    """Weights and momentum, in fp64 over whole matrices; the model has two query groups of two heads of width 16."""
    config = _config(None, {}, model)
    (first,) = worlds(1).run(first_weights, config=config)
    worlds(1).run(step_with_made_up_gradients, config=config, folder=tmp_path)
    found = read_checkpoint(tmp_path / "step_00000003")
    trained = [key for key in first if key.startswith("decoder.layers.") and first[key].dim() == 2]
    assert len(trained) == 4 * 4
    for key in trained:
        weight, momentum = first[key].double(), torch.zeros_like(first[key]).double()
        for step in range(3):
            gradient = made_up_gradient(key, first[key].shape, step).double() / NORM  # clipped to 1
            momentum = 0.95 * momentum + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * momentum
            update = torch.cat(updates(key, ahead, config))[row_order(key)]
            weight = weight * (1 - LEARNING_RATE * 0.1) - LEARNING_RATE * update
        assert torch.allclose(found[f"optimizer.state.exp_avg.{key}"], momentum.float(), rtol=1e-4, atol=1e-7), key
        assert torch.allclose(found[key], weight.float(), rtol=1e-5, atol=2e-5), key
        assert f"optimizer.state.{SECOND_MOMENT}.{key}" not in found
    by_adamw = [key for key in first if key not in trained]
    assert all(f"optimizer.state.{SECOND_MOMENT}.{key}" in found for key in by_adamw)


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_every_layout_updates_weights_and_states_bit_for_bit(
    worlds: Worlds, tmp_path: Path, recipe: str | None
) -> None:
    """From the same gradients; stochastic rounding, and blocks that ranks share, included."""
    expected = None
    for number, (size, layout) in enumerate(UPDATED):
        config = _config(None if recipe is None else RECIPES[recipe], layout)
        worlds(size).run(step_with_made_up_gradients, config=config, folder=tmp_path / str(number))
        found = read_checkpoint(tmp_path / str(number) / "step_00000003")
        expected = expected or found
        assert found.keys() == expected.keys()
        assert [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])] == [], layout


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {}), (2, {"distributed_optimizer": False}), (2, TP2)])
def test_the_states_take_the_planned_bytes(
    worlds: Worlds, recipe: str | None, size: int, layout: dict[str, Any]
) -> None:
    config = _config(None if recipe is None else RECIPES[recipe], layout)
    measured = worlds(size).run(measured_states, config=config)
    resolved = resolve(config, VOCAB_SIZE, config.parallel.data_parallel_size(size))
    (planned,) = stage_memory(resolved, make_plan(resolved).stages[0])
    # The second of two tensor-parallel ranks has columns 48 to 95, which touch two blocks: the plan counts one.
    error = 3e-3 if layout == TP2 else 1e-3
    assert max(measured) == pytest.approx(planned.model_state_bytes, rel=error)


@pytest.mark.parametrize("recipe", [None, "full", "compact 8 bits"])
@pytest.mark.parametrize(("size", "layout"), [(1, {}), (4, TP2)])
def test_a_loaded_run_goes_on_bit_for_bit(
    worlds: Worlds, tmp_path: Path, recipe: str | None, size: int, layout: dict[str, Any]
) -> None:
    config = _config(None if recipe is None else RECIPES[recipe], layout)
    expected = worlds(size).run(losses_of_six_steps, config=config, folder=tmp_path / "whole", interrupted=False)
    found = worlds(size).run(losses_of_six_steps, config=config, folder=tmp_path / "resumed", interrupted=True)
    assert found == expected


def updates(key: str, ahead: Tensor, config: RunConfig) -> list[Tensor]:
    """The update of each logical matrix of a weight, without the learning rate, in the order of `row_order`."""
    matrices = [ahead]
    if key.endswith("linear_qkv.weight"):
        groups = ahead.view(2, 64, ahead.shape[1])  # two heads of queries, a key, a value, of 16 rows each
        matrices = [groups[:, :32].flatten(0, 1), groups[:, 32:48].flatten(0, 1), groups[:, 48:].flatten(0, 1)]
    elif key.endswith("linear_fc1.weight") and config.model.gated_mlp:
        matrices = list(ahead.chunk(2))
    return [0.2 * max(matrix.shape) ** 0.5 * polynomial(matrix) for matrix in matrices]


def row_order(key: str) -> Tensor | slice:
    """For each row of a weight, its place in the logical matrices below one another."""
    if not key.endswith("linear_qkv.weight"):
        return slice(None)
    rows = torch.arange(128)
    return torch.cat([rows[:32], rows[64:80], rows[96:112], rows[32:64], rows[80:96], rows[112:]])


def polynomial(matrix: Tensor) -> Tensor:
    """Newton-Schulz's polynomial on the singular values: another way than products of matrices."""
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


# What the ranks run.


def first_weights(config: RunConfig) -> dict[str, Tensor] | None:
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        return whole_tensors(state, parallel, lambda weight: weight.detach())


def measured_states(config: RunConfig) -> int:
    with parallel_layout(config.parallel, 1) as parallel:
        return measure_states(initial_state(config, VOCAB_SIZE, parallel), 0).model_state_bytes


def losses_of_six_steps(config: RunConfig, folder: Path, interrupted: bool) -> list[float]:
    """With `interrupted`, three steps, a save, and three more from what is loaded into a new state."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        losses = []
        for step in range(6):
            if interrupted and step == 3:
                saver = CheckpointSaver(folder, config.checkpoint, parallel)
                saver.save(state.chunks, state.optimizer, training_recipe(config), 3, manifest_facts(config))
                state = loaded_state(config, folder, parallel)
            losses.append(train_step(state, made_up_batch(config, step, parallel), 3e-3, config, parallel, False).loss)
        return losses

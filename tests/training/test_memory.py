"""Measured bytes are those of the tensors, counted by hand."""

from dataclasses import replace

import pytest
import torch
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import _StorageTracker, measure_peak, measure_states, measure_step
from megatron_step.training.state import build_state, initial_state
from megatron_step.training.step import train_step


def test_the_tracker_sees_what_lives_at_once() -> None:
    with _StorageTracker() as tracker:
        first = torch.zeros(1000)  # 4000 bytes
        view = first[10:].view(-1, 2)  # the same storage
        second = torch.ones(500, dtype=torch.float64)  # 4000 bytes
        assert tracker.peak_bytes == 8000
        del first, view
        third = torch.zeros(250)  # 1000 bytes: 5000 live
        assert tracker.peak_bytes == 8000
        second.add_(1)
        fourth = torch.zeros(1001)  # 4004 bytes: 9004 live
    assert tracker.peak_bytes == 9004
    del second, third, fourth


def test_the_tracker_sees_what_the_backward_pass_keeps() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(128, 64)
    with _StorageTracker() as tracker:
        hidden = (x @ weight).relu()  # the product is freed as relu keeps its own output: [128, 64] at last
        live = 128 * 64 * 4
        assert tracker._live_bytes == live
        hidden.sum().backward()
    assert tracker.peak_bytes >= 2 * live, "the output and its gradient"
    assert tracker._live_bytes >= weight.grad.nbytes


def test_the_peak_of_some_work_is_what_it_had_at_once() -> None:
    before = torch.zeros(1 << 20)
    result, peak_bytes = measure_peak(lambda: sum(float(torch.ones(1000).sum()) for _ in range(5)))
    assert result == 5000
    assert 4000 <= peak_bytes < 8000, "one tensor at a time, and nothing of what was there before"
    assert before.nbytes > peak_bytes


@pytest.mark.parametrize(("precision", "per_weight"), [("fp32", 4 + 4 + 8), ("bf16", 2 + 4 + 4 + 8)])
def test_model_states_by_the_rule_of_thumb(alone: Parallel, precision: str, per_weight: int) -> None:
    state = initial_state(small_config(training={"precision": precision}), VOCAB_SIZE, alone)
    weights = sum(param.numel() for param in state.chunks[0].parameters())
    measured = measure_states(state, activation_bytes=7)
    # Gradient buffers are padded, and one buffer can hold several tensors: a little more than the rule.
    assert weights * per_weight <= measured.model_state_bytes <= weights * per_weight * 1.01 + 8192
    assert measured.peak_bytes == measured.model_state_bytes + 7
    assert measured.frozen_weight_bytes == measured.adapter_weight_bytes == 0


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(("precision", "weight", "moments"), [("fp32", 4, 8), ("bf16", 2, 12)])
def test_a_frozen_base_is_counted_by_its_kinds(
    alone: Parallel, precision: str, weight: int, moments: int, distributed: bool
) -> None:
    config = small_config(
        stages={"count": 2, "layers": [3, 1]},
        training={"precision": precision},
        parallel={"distributed_optimizer": distributed},
    )
    parallel = replace(alone, config=config.parallel)
    plan = make_plan(resolve(config, VOCAB_SIZE))
    state = build_state(config, plan, plan.stages[1], plan.stages[1].first_step, VOCAB_SIZE, parallel)
    params = dict(state.chunks[0].named_parameters())
    adapters = sum(param.numel() for name, param in params.items() if ".adapter." in name)
    frozen = sum(param.numel() for param in params.values() if not param.requires_grad)
    trained = sum(param.numel() for param in params.values() if param.requires_grad)
    measured = measure_states(state, activation_bytes=0)
    padding = 64 * len(params) if distributed else 0  # the distributed optimizer's buffers round every weight up
    assert measured.frozen_weight_bytes == weight * frozen > 0
    assert measured.adapter_weight_bytes == weight * adapters > 0
    assert 0 <= measured.trained_weight_bytes - weight * (trained - adapters) <= weight * padding
    assert 0 <= measured.gradient_bytes - 4 * trained <= 4 * padding
    assert measured.optimizer_bytes == moments * trained


def test_a_longer_step_needs_more_beside_the_same_states(alone: Parallel) -> None:
    memories = []
    for size in (1, 4):
        config = small_config(training={"micro_batch_size": size})
        state = initial_state(config, VOCAB_SIZE, alone)
        batch = made_up_batch(config, 0, alone)
        result, memory = measure_step(state, lambda: train_step(state, batch, 1e-3, config, alone, False))  # noqa: B023
        assert result.loss > 0
        memories.append(memory)
    assert memories[0].model_state_bytes == memories[1].model_state_bytes
    assert 2 < memories[1].activation_bytes / memories[0].activation_bytes < 4.5
    assert memories[0].peak_bytes == memories[0].model_state_bytes + memories[0].activation_bytes


def test_recompute_needs_less(alone: Parallel) -> None:
    activations = []
    for recompute in ("none", "full"):
        config = small_config(parallel={"recompute": recompute}, training={"micro_batch_size": 8})
        parallel = replace(alone, config=config.parallel)
        state = initial_state(config, VOCAB_SIZE, parallel)
        batch = made_up_batch(config, 0, parallel)
        _, memory = measure_step(state, lambda: train_step(state, batch, 1e-3, config, parallel, False))  # noqa: B023
        activations.append(memory.activation_bytes)
    assert activations[1] < 0.7 * activations[0]

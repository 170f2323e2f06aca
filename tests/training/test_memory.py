"""Measured bytes are those of the tensors, counted by hand."""

import pytest
import torch
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.training.memory import Memory, _StorageTracker, measure_step, model_state_bytes
from megatron_step.training.state import initial_state
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


@pytest.mark.parametrize(("precision", "per_weight"), [("fp32", 4 + 4 + 8), ("bf16", 2 + 4 + 4 + 8)])
def test_model_states_by_the_rule_of_thumb(alone: Parallel, precision: str, per_weight: int) -> None:
    state = initial_state(small_config(training={"precision": precision}), VOCAB_SIZE, alone)
    weights = sum(param.numel() for param in state.chunks[0].parameters())
    # Gradient buffers are padded, and one buffer can hold several tensors: a little more than the rule.
    assert weights * per_weight <= model_state_bytes(state) <= weights * per_weight * 1.01 + 8192


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
    from dataclasses import replace

    activations = []
    for recompute in ("none", "full"):
        config = small_config(parallel={"recompute": recompute}, training={"micro_batch_size": 8})
        parallel = replace(alone, config=config.parallel)
        state = initial_state(config, VOCAB_SIZE, parallel)
        batch = made_up_batch(config, 0, parallel)
        _, memory = measure_step(state, lambda: train_step(state, batch, 1e-3, config, parallel, False))  # noqa: B023
        activations.append(memory.activation_bytes)
    assert activations[1] < 0.7 * activations[0]


def test_the_peak_is_the_sum() -> None:
    assert Memory(3, 4).peak_bytes == 7

"""Restarted adapters leave the model's function as it is and start again."""

from typing import Any

import pytest
import torch
from serial_oracle import fill_adapters, state_of
from small_run import made_up_batch, small_config

from megatron_step.adapters.attach import adapted_linears
from megatron_step.adapters.restart import restart_adapters
from megatron_step.engine.parallel import Parallel
from megatron_step.training.step import evaluate_batch

STAGES: dict[str, Any] = {"count": 2, "layers": [3, 1]}


def test_the_function_stays_and_the_adapters_are_fresh(alone: Parallel) -> None:
    config = small_config(stages=STAGES)
    state = state_of(config, 1, alone)
    fill_adapters(state)
    linears = list(adapted_linears(state.chunks[0]))
    old = [(linear.weight.clone(), linear.adapter.linear_in.weight.clone()) for linear in linears]
    batch = made_up_batch(config, 1, alone)
    before = evaluate_batch(state.chunks, batch, config, alone)
    restart_adapters(state.chunks, config.model, alone, seed=77)
    assert evaluate_batch(state.chunks, batch, config, alone) == pytest.approx(before, rel=1e-6)
    for linear, (weight, factor) in zip(linears, old):
        assert not torch.equal(linear.weight, weight), "what it has learnt is in the base"
        assert not torch.equal(linear.adapter.linear_in.weight, factor), "it is drawn again"
        assert not linear.adapter.linear_out.weight.any()

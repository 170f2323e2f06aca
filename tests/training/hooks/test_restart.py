"""Adapters restart at their interval: merged and drawn again, with pruned moments, the same in every layout."""

from typing import Any

import pytest
import torch
from serial_oracle import state_of
from small_run import made_up_batch, small_config, whole_tensors
from torch import Tensor
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.optim.owned import owned
from megatron_step.training.hooks.restart import restart
from megatron_step.training.state import TrainState
from megatron_step.training.step import train_step

STAGES: dict[str, Any] = {"count": 2, "layers": [4, 0], "steps": [4, 10], "grow_at": 1.0}  # steps 5 to 14 are adapted


def _config(**sections: Any) -> RunConfig:
    return small_config(stages=STAGES, **{"adapter": {"restart_interval": 3}, **sections})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_moments_are_pruned_and_training_goes_on_from_the_fresh_values(alone: Parallel, precision: str) -> None:
    config = _config(training={"precision": precision})
    state = state_of(config, 1, alone)
    batch = made_up_batch(config, 0, alone)
    before = [train_step(state, batch, 1e-3, config, alone, False).loss for _ in range(3)]
    share = restart(state, config, alone)
    assert 0.89 < share < 0.93
    for shard in sharded_weights(state.chunks, alone).values():
        if shard.data.role == "adapter":
            states = owned(state.optimizer, shard.data).states
            kept = states["exp_avg"] != 0
            assert 0 < kept.sum() <= 0.1 * kept.numel() + 1
            assert torch.equal(states["exp_avg_sq"] != 0, kept)
            if precision == "bf16":
                assert torch.equal(states["param"].view_as(shard.data), shard.data.float()), "the main weight is fresh"
    assert train_step(state, batch, 1e-3, config, alone, False).loss < before[-1], "it learns on"


def test_each_restart_draws_other_values(alone: Parallel) -> None:
    config = _config()
    state = state_of(config, 1, alone)
    drawn = [_inputs(state)]
    for step in range(2):
        train_step(state, made_up_batch(config, step, alone), 1e-3, config, alone, False)
        restart(state, config, alone)
        drawn.append(_inputs(state))
    assert not any(torch.equal(drawn[one], drawn[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def _inputs(state: TrainState) -> Tensor:
    return state.chunks[0].module.decoder.layers[0].mlp.linear_fc2.adapter.linear_in.weight.detach().clone()


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, {}),
        (2, {"distributed_optimizer": False}),
        (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
        (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    ],
)
def test_every_layout_restarts_as_one_process(worlds: Worlds, size: int, layout: dict[str, Any]) -> None:
    (expected,) = worlds(1).run(train_restart_train, config=_config())
    found = worlds(size).run(train_restart_train, config=_config(parallel=layout))[0]
    assert found["share"] == pytest.approx(expected["share"], abs=1e-3)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for key, weight in expected["weights"].items():
        assert (found["weights"][key] - weight).norm() <= 1e-4 * weight.norm(), key


def test_a_tensor_that_data_parallel_ranks_share_is_pruned_as_a_whole(worlds: Worlds) -> None:
    # Of three layers, the middle of the optimizer's buffer lies within an adapter.
    model, stages = {"num_layers": 3, "num_query_groups": 2}, {**STAGES, "layers": [3, 0]}
    config = small_config(model=model, stages=stages)
    (expected,) = worlds(1).run(kept_moments, config=config)
    first, second = worlds(2).run(kept_moments, config=config)
    assert [key for key, kept in expected.items() if not torch.equal(torch.cat([first[key], second[key]]), kept)] == []
    assert any(len(first[key]) and len(second[key]) for key in expected)


# What the ranks run.


def kept_moments(config: RunConfig) -> dict[str, Tensor]:
    """Return which of this rank's first moments of each adapter, flat, are not zero after a restart."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, 1, parallel)
        for step in range(2):
            train_step(state, made_up_batch(config, step, parallel), 1e-3, config, parallel, False)
        restart(state, config, parallel)
        return {
            key: own.states["exp_avg"] != 0 if (own := owned(state.optimizer, shard.data)) else torch.empty(0) != 0
            for key, shard in sharded_weights(state.chunks, parallel).items()
            if shard.data.role == "adapter"
        }


def train_restart_train(config: RunConfig) -> dict[str, Any]:
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, 1, parallel)
        losses = []
        for step in range(6):
            losses.append(train_step(state, made_up_batch(config, step, parallel), 1e-3, config, parallel, False).loss)
            if step == 2:
                share = restart(state, config, parallel)
        weights = whole_tensors(state, parallel, lambda weight: weight.detach())
        return {"losses": losses, "share": share, "weights": weights}

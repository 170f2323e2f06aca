from typing import Any

import pytest
import torch
from small_run import TIED, VOCAB_SIZE, made_up_batch, small_config
from worlds import Worlds

from megatron_step.checkpoint.sharding import sharded_optimizer_states
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.optim.owned import owned
from megatron_step.plan.states import RECIPES, training_recipe
from megatron_step.training.state import initial_state
from megatron_step.training.step import train_step

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"distributed_optimizer": False}),
    (2, {"tensor_parallel_size": 2}),
    (2, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "sequence_parallel": True}),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_keys_and_shapes_are_the_same_in_every_layout(worlds: Worlds, precision: str) -> None:
    training = {"precision": precision}
    (expected,) = worlds(1).run(keys_and_shapes, config=small_config(model=TIED, training=training))
    weights = {key for key in expected if not key.startswith("optimizer.")}
    assert expected.keys() - weights == {
        f"optimizer.state.{name}.{key}"
        for name in RECIPES[{"fp32": "fp32", "bf16": "full"}[precision]].optimizer_states("a", (1,))
        for key in weights
    }
    assert expected["decoder.layers.3.self_attention.linear_proj.weight"] == (64, 64)
    for size, layout in LAYOUTS:
        ranks = worlds(size).run(keys_and_shapes, config=small_config(model=TIED, training=training, parallel=layout))
        found = {key: shape for rank in ranks for key, shape in rank.items()}
        assert found == expected, layout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_own_states_of_the_data_parallel_ranks_are_the_whole_moments(worlds: Worlds, precision: str) -> None:
    training = {"precision": precision}
    model = {"num_layers": 3}  # the middle of the buffer lies within a weight
    whole_config = small_config(model=model, training=training, parallel={"distributed_optimizer": False})
    whole, also_whole = worlds(2).run(moments, config=whole_config)
    first, second = worlds(2).run(moments, config=small_config(model=model, training=training))
    assert whole.keys() == first.keys() == second.keys()
    for key, moment in whole.items():
        assert torch.equal(moment, also_whole[key]), key
        # The reductions of the two layouts add in the same order: each element is the sum of two ranks' gradients.
        assert torch.equal(torch.cat([first[key], second[key]]), moment), key
    assert any(len(first[key]) == 0 for key in first), "a rank holds no part of some weights"
    assert any(len(first[key]) and len(second[key]) for key in first), "and a part of others"


# What the ranks run.


def keys_and_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of all shards that this rank saves and loads."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        weights = sharded_weights(state.chunks, parallel)
        states = sharded_optimizer_states(state.optimizer, weights, training_recipe(config))
        return flatten([*weights.values(), *states.values()])


def flatten(shards: Any) -> dict[str, tuple[int, ...]]:
    tensors = [part for shard in shards for part in (shard.build() if hasattr(shard, "build") else [shard])]
    return {tensor.key: tuple(tensor.global_shape) for tensor in tensors}


def moments(config: RunConfig) -> dict[str, torch.Tensor]:
    """This rank's part of every second moment after a step, flat."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        train_step(state, made_up_batch(config, 0, parallel), 1e-3, config, parallel, False)
        return {
            key: own.states["exp_avg_sq"].clone() if (own := owned(state.optimizer, shard.data)) else torch.empty(0)
            for key, shard in sharded_weights(state.chunks, parallel).items()
        }

"""The slices that data-parallel ranks own are all of a weight, each element once."""

from typing import Any

import pytest
import torch
from small_run import VOCAB_SIZE, small_config
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.optim.owned import owned
from megatron_step.training.state import initial_state


@pytest.mark.parametrize("states", ["full", "compact"])
@pytest.mark.parametrize("distributed", [True, False])
def test_ranks_own_every_element_with_its_states(worlds: Worlds, states: str, distributed: bool) -> None:
    config = small_config(
        training={"precision": "bf16"},
        optimizer={"states": states},
        parallel={"distributed_optimizer": distributed},
    )
    first, second = worlds(2).run(owned_elements, config=config)
    for name, numel in first.pop("numel").items():
        slices = [rank[name] for rank in (first, second) if name in rank]
        if distributed:
            assert sorted(index for own in slices for index in own) == list(range(numel)), name
        else:
            assert slices == [range(numel)] * 2


# What the ranks run.


def owned_elements(config: RunConfig) -> dict[str, Any]:
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        found: dict[str, Any] = {"numel": {}}
        for name, shard in sharded_weights(state.chunks, parallel).items():
            found["numel"][name] = shard.data.numel()
            own = owned(state.optimizer, shard.data)
            if own is None:
                continue
            found[name] = range(own.elements.start, own.elements.stop)
            assert own.is_replicated != config.parallel.distributed_optimizer
            assert own.updated.numel() == len(found[name])
            assert ("param" in own.states) == (config.optimizer.states == "full")
            for state_name in ("exp_avg", "exp_avg_sq"):
                assert own.states[state_name].shape == (len(found[name]),)
            values = own.updated.detach().view(-1).float()
            assert torch.equal(values, shard.data.detach().flatten()[own.elements].float())
        return found

"""States of a resting weight wait on the host in equal shares, and go to the elements that the optimizer owns."""

from typing import Any

import pytest
import torch
from serial_oracle import state_of
from small_run import small_config
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.optim.owned import Held, held, owned
from megatron_step.optim.pieces import owned_pieces, zero_states
from megatron_step.optim.resting import gathered, on_host, rest, take
from megatron_step.plan.states import training_recipe

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
# The heads' columns of a tensor-parallel rank end within a block of moments, and so do the rows of data-parallel ranks.
ODD = {"num_layers": 3, "hidden_size": 60, "head_size": 10, "num_attention_heads": 6, "num_query_groups": 2}


def _config(states: str, parallel: dict[str, Any] | None = None) -> RunConfig:
    rotation = {"policy": "rotate", "turn_steps": 2}
    precision = "fp32" if states == "fp32" else "bf16_weights"
    return small_config(
        model={**ODD, "ffn_hidden_size": 50},
        stages={"count": 2, "layers": [2, 1]},
        old_layers=rotation,
        parallel=parallel,
        training={"precision": precision, "global_batch_size": 12},
        optimizer={} if states == "fp32" else {"states": states},
    )


@pytest.mark.parametrize("states", ["fp32", "full", "exact", "compact"])
@pytest.mark.parametrize(("size", "layout"), [(1, {}), (3, {}), (4, TP2), (2, {"distributed_optimizer": False})])
def test_what_ranks_have_comes_together_and_is_shared_out(
    worlds: Worlds, size: int, layout: dict[str, Any], states: str
) -> None:
    for checked, wrong in worlds(size).run(share_and_gather, config=_config(states, layout)):
        assert checked > 20
        assert wrong == []


def test_main_weights_are_the_weights(worlds: Worlds) -> None:
    for states, name in (("full", "param"), ("exact", "remainder"), ("compact", "remainder"), ("smallest", None)):
        for resting in worlds(2).run(resting_states, config=_config(states)):
            assert len(resting) == 4, "the matrices of one layer"
            for weight, own in resting:
                assert not own["exp_avg"].any() and own["exp_avg"].device.type == "cpu"
                assert abs(len(own["exp_avg"]) - weight.numel() / 2) < 1
                if name == "param":
                    assert torch.equal(own["param"], weight.float()[: len(own["param"])]) or torch.equal(
                        own["param"], weight.float()[-len(own["param"]) :]
                    )
                assert name is None or name in own


# What the ranks run.


def share_and_gather(config: RunConfig) -> tuple[int, list[str]]:
    """Give out random states of each weight, as any two divisions of it, and gather them; return what differs."""
    recipe, checked, wrong = training_recipe(config), 0, []
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, 1, parallel)
        for name, shard in sharded_weights(state.chunks, parallel).items():
            whole_slice = slice(0, shard.data.numel())
            formats = recipe.optimizer_states(shard.key, shard.data.shape)
            whole = zero_states(formats, list(owned_pieces(shard, whole_slice)), parallel.device)
            generator = torch.Generator().manual_seed(hash_of(name) + parallel.tp_rank)
            for tensor in whole.values():
                raw = tensor.view(torch.uint8)
                raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
            rest(shard, recipe, parallel)
            divisions: list[Held | None] = [shard.data.resting]
            if shard.data.requires_grad:
                own = owned(state.optimizer, shard.data)
                divisions.append(None if own is None else on_host(own, shard, recipe, parallel))
            for part in divisions:
                if part is not None:
                    take(whole, shard, part)
                found = gathered(part, shard, recipe, parallel)
                checked += 1
                equal = all(torch.equal(found[key].view(torch.uint8), whole[key].view(torch.uint8)) for key in whole)
                if not equal or found.keys() != whole.keys():
                    wrong.append(name)
    return checked, wrong


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def resting_states(config: RunConfig) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, 1, parallel)
        return [
            (shard.data.detach().flatten(), held(state.optimizer, shard.data).states)
            for shard in sharded_weights(state.chunks, parallel).values()
            if shard.data.rests
        ]

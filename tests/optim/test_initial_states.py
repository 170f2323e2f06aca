"""Zero states by the rule of each weight; every weight has one owner, or as many as there are replicas."""

from typing import Any

import pytest
from small_run import TIED, VOCAB_SIZE, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import sharded_weights
from megatron_step.optim.initial_states import inner_parts
from megatron_step.optim.owned import owned
from megatron_step.plan.matrices import rule_of
from megatron_step.plan.states import training_recipe
from megatron_step.training.state import initial_state


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("states", [None, "full", "exact", "compact", "smallest"])
def test_each_weight_has_the_states_of_its_recipe(alone: Parallel, rule: str, states: str | None) -> None:
    optimizer: dict[str, Any] = {"rule": rule, **({"states": states} if states else {})}
    precision = "bf16" if states else "fp32"
    config = small_config(model=TIED, training={"precision": precision}, optimizer=optimizer)
    state = initial_state(config, VOCAB_SIZE, alone)
    assert state.optimizer is not None
    recipe, rules = training_recipe(config), set()
    for shard in sharded_weights(state.chunks, alone).values():
        own = owned(state.optimizer, shard.data)
        assert own is not None
        # An fp32 weight is its own main weight.
        names = {name for name in own.states if not name.endswith("_scale")} - ({"param"} if states is None else set())
        assert names == set(recipe.optimizer_states(shard.key, shard.data.shape))
        assert not any(value.any() for name, value in own.states.items() if name != "param")
        rules.add(rule_of(shard.key, shard.data.shape, recipe.rule))
    assert rules == {"adamw", rule}
    (part,) = inner_parts(state.optimizer)
    assert (part.optimizer.muon is not None) == (rule == "muon")
    assert {group["rule"] for group in part.optimizer.param_groups if group["params"]} == rules

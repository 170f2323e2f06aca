"""Policies for old layers: how one is named, what contradicts it, and when it changes the layers."""

from typing import Any

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.run import RunConfig
from megatron_step.plan.old_layers import (
    Frozen,
    Trained,
    adapter_targets,
    adapts,
    changes_after,
    policy_of,
    register,
    since_change,
    turn_at,
)
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan

STAGES: dict[str, Any] = {"count": 2, "layers": [3, 1], "steps": [4, 10], "grow_at": 1.0}


def _config(policy: str | None = None, **sections: Any) -> RunConfig:
    return small_config(stages=STAGES, old_layers={"policy": policy}, **sections)


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({}, "adapters"),
        ({"adapter": {"rank": 0}}, "frozen"),
        ({"freeze": {"layers": False}}, "trained"),
        ({"policy": "frozen"}, "frozen"),
        ({"policy": "trained"}, "trained"),
        ({"policy": "adapters"}, "adapters"),
    ],
)
def test_a_policy_is_named_or_follows_from_older_keys(sections: dict[str, Any], name: str) -> None:
    config = _config(**sections)
    make_plan(resolve(config, VOCAB_SIZE))  # raises nothing
    assert policy_of(config).name == name
    assert adapts(config) is (name == "adapters")
    assert bool(adapter_targets(0, make_plan(resolve(config, VOCAB_SIZE)).stages[1], config)) is (name == "adapters")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"policy": "frozen", "freeze": {"layers": False}},
            "freeze.layers false trains all .* but old_layers.policy frozen does",
        ),
        ({"policy": "adapters", "freeze": {"layers": False}}, "policy adapters does not: remove one of the two"),
        (
            {"policy": "adapters", "adapter": {"rank": 0}},
            "adds adapters, but adapter.rank is 0: set adapter.rank to at least 1, or",
        ),
        ({"policy": "melted"}, "old_layers.policy melted is unknown: choose one of frozen, adapters, trained"),
    ],
)
def test_a_contradiction_is_one_clear_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(resolve(_config(**sections), VOCAB_SIZE))
    assert "\n" not in str(caught.value)


def test_a_name_is_taken_once() -> None:
    class Other(Trained):
        name = "frozen"

    register(Frozen())  # the same one again, as a plugin that is imported twice does
    with pytest.raises(ValueError, match="a policy for old layers called frozen already exists"):
        register(Other())


def test_changes_come_inside_a_stage_after_the_first_and_never_at_its_end() -> None:
    config = _config(adapter={"restart_interval": 5})
    first, last = make_plan(resolve(config, VOCAB_SIZE)).stages  # steps 1 to 4, and 5 to 14
    assert not any(changes_after(step, first, config) for step in range(5))
    assert [step for step in range(4, 15) if changes_after(step, last, config)] == [9]
    assert [since_change(step, last, config) for step in range(4, 14)] == [0, 1, 2, 3, 4] * 2
    assert [turn_at(step, last, config) for step in range(4, 15)] == [0] * 5 + [1] * 6
    frozen = _config("frozen", adapter={"restart_interval": 5})
    assert [since_change(step, last, frozen) for step in (4, 9, 13)] == [0, 5, 9]
    assert turn_at(13, last, frozen) == 0

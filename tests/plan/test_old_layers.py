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
    since_rewarm,
    turn_at,
)
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import plan_from_dict
from megatron_step.planner.forecast import plan_and_forecast
from megatron_step.planner.plan import make_plan

STAGES: dict[str, Any] = {"count": 2, "layers": [3, 1], "steps": [4, 10], "grow_at": 1.0}


def _config(policy: str | None = None, **sections: Any) -> RunConfig:
    return small_config(stages=STAGES, old_layers={"policy": policy, "turn_steps": 4}, **sections)


def _rotate(stages: dict[str, Any], parallel: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    model = {"num_layers": sum(stages["layers"]), "num_query_groups": 2}
    return small_config(model=model, stages=stages, parallel=parallel, old_layers={"policy": "rotate", **keys})


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({}, "adapters"),
        ({"adapter": {"rank": 0}}, "frozen"),
        ({"freeze": {"layers": False}}, "trained"),
        ({"policy": "frozen"}, "frozen"),
        ({"policy": "trained"}, "trained"),
        ({"policy": "adapters"}, "adapters"),
        ({"policy": "rotate"}, "rotate"),
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
        ({"policy": "melted"}, "old_layers.policy melted is unknown: choose one of frozen, adapters, rotate, trained"),
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


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"turn_steps": 11}, "turn_steps 11 is more than the 10 steps of stage 2: .* to less than 10"),
        (
            {"turn_steps": 2, "active_share": 0.4, "parallel": {"pipeline_parallel_size": 2}},
            "share 0.4 of the 1 old layer that a pipeline rank has in stage 2 rounds to no layer: .* at least 0.5",
        ),
    ],
)
def test_a_rotation_that_leaves_layers_without_a_turn_is_one_clear_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(resolve(_rotate(STAGES, **sections), VOCAB_SIZE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        ({}, ((0, 1, 2, 3, 4, 5, 6, 8),)),
        ({"pipeline_parallel_size": 2}, ((0, 1, 2, 3, 4), (5, 6, 8))),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}, ((0, 1, 2, 5, 6), (3, 4, 8))),
    ],
)
def test_each_rank_trains_its_share_in_every_turn(layout: dict[str, Any], groups: tuple[tuple[int, ...], ...]) -> None:
    stages = {**STAGES, "layers": [8, 1], "layouts": "even"}  # layer 7 is new
    config = _rotate(stages, layout, turn_steps=2)
    stage, rotate = make_plan(resolve(config, VOCAB_SIZE)).stages[1], policy_of(config)
    assert stage.turn_groups == groups
    for group in groups:
        counts = [0] * len(group)
        for turn in range(rotate.num_turns(stage, config)):
            found = [rotate.treatment(f"decoder.layers.{n}.mlp.linear_fc2.weight", turn, stage, config) for n in group]
            assert sum(one.trained for one in found) == (len(group) + 1) // 2
            assert all(one.rests is not one.trained for one in found)
            counts = [count + one.trained for count, one in zip(counts, found)]
        assert min(counts) > 0
    norm = rotate.treatment("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", 1, stage, config)
    assert norm.trained and not norm.rests


def test_a_run_that_resumes_in_another_layout_trains_the_same_layers() -> None:
    """The stage that it has begun keeps its groups; a later one gets those of the new layout."""
    stages = {"count": 3, "layers": [4, 2, 2], "layouts": "even"}
    pipeline = _rotate(stages, {"pipeline_parallel_size": 2}, turn_steps=2)
    saved = plan_from_dict(make_plan(resolve(pipeline, VOCAB_SIZE)).to_dict()).stages
    resumed = plan_and_forecast(resolve(_rotate(stages, turn_steps=2), VOCAB_SIZE), [4, 2, 2], saved[:2]).plan.stages
    assert [len(stage.turn_groups) for stage in saved] == [0, 2, 2]
    assert [stage.turn_groups for stage in resumed[:2]] == [(), saved[1].turn_groups]
    assert len(resumed[2].turn_groups) == 1


def test_a_turn_with_kept_moments_needs_no_warm_up() -> None:
    keep, reset = (_rotate(STAGES, turn_steps=4, moments=moments) for moments in ("keep", "reset"))
    stage = make_plan(resolve(keep, VOCAB_SIZE)).stages[1]
    assert [since_change(step, stage, keep) for step in range(4, 14)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [since_rewarm(step, stage, keep) for step in range(4, 14)] == list(range(10))
    assert [since_rewarm(step, stage, reset) for step in range(4, 14)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_turns_that_differ_are_those_of_a_cycle_or_of_the_stage() -> None:
    for turn_steps, turns in ((3, 3), (5, 2), (10, 1)):
        config = _rotate(STAGES, turn_steps=turn_steps)  # 2 of 3 layers
        assert policy_of(config).num_turns(make_plan(resolve(config, VOCAB_SIZE)).stages[1], config) == turns
    assert policy_of(_rotate(STAGES, active_share=0.3)).period(_rotate(STAGES, active_share=0.3)) == 10

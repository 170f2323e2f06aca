"""A plan follows from the config: layers, steps and layout of every stage."""

from typing import Any

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.run import RampUpConfig, batch_size_at
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import StagePlan
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.planner.plan import make_plan


def _plan(model: dict[str, Any] | None = None, **sections: Any) -> StagePlan:
    return make_plan(
        resolve(small_config(model={"num_layers": 6, "num_query_groups": 2, **(model or {})}, **sections), VOCAB_SIZE)
    )


def test_stages_end_at_their_share_and_the_last_one_at_its_end() -> None:
    plan = _plan(stages={"count": 3, "layers": [3, 2, 1], "steps": [10, 20, 30], "grow_at": 0.75})
    assert [(stage.first_step, stage.last_step) for stage in plan.stages] == [(0, 8), (8, 23), (23, 53)]
    assert [stage.schedule_steps for stage in plan.stages] == [10, 20, 30]
    assert [stage.grows for stage in plan.stages] == [True, True, False]
    assert [stage.num_layers for stage in plan.stages] == [3, 5, 6]
    assert [stage.num_new_layers for stage in plan.stages] == [3, 2, 1]


def test_each_growth_has_its_time() -> None:
    plan = _plan(stages={"count": 3, "layers": [3, 2, 1], "steps": 20, "grow_at": [0.25, 0.5]})
    assert [(stage.first_step, stage.last_step) for stage in plan.stages] == [(0, 5), (5, 15), (15, 35)]


@pytest.mark.parametrize("budget", [{"steps": 10}, {"steps": None, "tokens": 10 * 8 * 32}])
def test_shares_divide_the_run(budget: dict[str, Any]) -> None:
    plan = _plan(stages={"count": 3, "layers": [3, 2, 1], "shares": [0.25, 0.25, 0.5], **budget})
    assert [(stage.first_step, stage.last_step) for stage in plan.stages] == [(0, 2), (2, 5), (5, 10)]
    assert [stage.schedule_steps for stage in plan.stages] == [2, 3, 5]


def test_a_share_of_less_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stages.shares gives stage 1 0.1 of 4 steps, less than one step"):
        _plan(stages={"count": 2, "layers": [3, 3], "steps": 4, "shares": [0.1, 0.9]})


def test_a_first_stage_without_a_share_is_a_model_trained_before() -> None:
    stages = {"count": 2, "layers": [3, 3], "steps": 4, "shares": [0.0, 1.0], "start_from": "x"}
    assert [stage.num_steps for stage in _plan(stages=stages).stages] == [0, 4]


def test_one_stage_is_the_whole_model() -> None:
    (stage,) = _plan(steps=7).stages
    assert (stage.num_layers, stage.first_step, stage.last_step, stage.grows) == (6, 0, 7, False)


def test_tokens_become_steps() -> None:
    tokens = 10 * 8 * 32  # ten steps of eight samples of 32 tokens
    plan = _plan(stages={"count": 2, "layers": [4, 2], "steps": None, "tokens": [tokens, tokens + 1]})
    assert [stage.schedule_steps for stage in plan.stages] == [10, 11]


def test_tokens_under_a_ramp_up_take_more_steps() -> None:
    ramp = RampUpConfig(start=2, increment=2, samples=60)
    config = small_config(
        stages={"count": 2, "layers": [2, 2], "steps": None, "tokens": 100 * 32},
        training={"micro_batch_size": 1, "ramp_up": ramp},
    )
    plan = make_plan(resolve(config, VOCAB_SIZE))
    consumed = [0]
    for _ in range(plan.num_steps):
        consumed.append(consumed[-1] + batch_size_at(config.training, consumed[-1]))
    first, second = plan.stages
    assert consumed[first.schedule_steps - 1] < 100 <= consumed[first.schedule_steps]
    begin = consumed[second.first_step]
    assert consumed[second.last_step - 1] < begin + 100 <= consumed[second.last_step]


def test_layouts_are_even_or_given_if_asked_for() -> None:
    parallel = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}
    even = _plan(stages={"count": 2, "layers": [4, 2], "layouts": "even"}, parallel=parallel)
    assert [stage.layout for stage in even.stages] == [(1, 1, 1, 1), (2, 2, 1, 1)]
    given = _plan(stages={"count": 2, "layers": [4, 2], "layouts": [[1, 1, 1, 1], [1, 3, 1, 1]]}, parallel=parallel)
    assert given.stages[1].layout == (1, 3, 1, 1)
    assert given.solution is even.solution is None


def test_layouts_say_how_deep_their_stages_are() -> None:
    plan = _plan(stages={"count": 2, "layouts": [[1, 2], [4, 2]]}, parallel={"pipeline_parallel_size": 2})
    assert [stage.num_new_layers for stage in plan.stages] == [3, 3]
    with pytest.raises(ValueError, match=r"give the stages \[3, 5\] layers, but these must grow to .* 6"):
        _plan(stages={"count": 2, "layouts": [[1, 2], [4, 1]]}, parallel={"pipeline_parallel_size": 2})


def test_the_planner_chooses_layouts_for_layers_that_are_given() -> None:
    """The first rank keeps more micro-batches and the last one the logits: even layouts need more."""

    def peak(layouts: str) -> int:
        stages = {"count": 2, "layers": [7, 2], "layouts": layouts}
        parallel = {"pipeline_parallel_size": 3}
        config = small_config(model={"num_layers": 9, "vocab_size": 4096}, stages=stages, parallel=parallel)
        plan = make_plan(resolve(config, 4096))
        assert [stage.num_layers for stage in plan.stages] == [7, 9]
        return max(rank.peak_bytes for stage in plan.stages for rank in stage_memory(resolve(config, 4096), stage))

    assert peak("auto") < peak("even")


@pytest.mark.parametrize(
    ("stages", "parallel", "message"),
    [
        ({"count": 2, "layers": [1, 5]}, {"pipeline_parallel_size": 2}, "stage 1 has 1 layer for .*_size 2 x"),
        ({"layouts": [[4, 1]]}, {"pipeline_parallel_size": 2}, r"\[4, 1\] of stage 1 must be 2 numbers.*its 6 layers"),
        ({"layouts": [[6, 0]]}, {"pipeline_parallel_size": 2}, "each at least 1"),
        ({"layouts": [[6]]}, {"pipeline_parallel_size": 2}, "must be 2 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(stages: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(stages=stages, parallel=parallel)


def test_layers_that_were_chosen_before_stay() -> None:
    config = small_config(stages={"count": 2})
    assert [stage.num_new_layers for stage in make_plan(resolve(config, VOCAB_SIZE), chosen=[1, 3]).stages] == [1, 3]


def test_auto_chooses_layers_for_every_stage() -> None:
    plan = _plan(stages={"count": 3})
    assert sum(stage.num_new_layers for stage in plan.stages) == 6
    assert all(stage.num_new_layers >= 1 for stage in plan.stages)


def test_a_first_stage_of_no_steps_is_a_start_checkpoint() -> None:
    stages = {"count": 2, "layers": [4, 2], "steps": [0, 10], "start_from": "somewhere"}
    first, second = _plan(stages=stages).stages
    assert (first.first_step, first.last_step, second.first_step, second.last_step) == (0, 0, 0, 10)
    assert [layer.sources for layer in first.layers] == [(0,), (1,), (2,), (3,)]

"""A plan is a value: it goes through JSON unchanged, and says which stage a step is in."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.parallel import ParallelConfig
from megatron_step.plan.layout import rank_chunks
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import even_layout, first_steps, plan_from_dict
from megatron_step.planner.plan import make_plan

_PLAN = make_plan(
    resolve(
        small_config(
            model={"num_layers": 7},
            stages={"count": 3, "layers": [4, 2, 1], "steps": 8, "layouts": "even"},
            parallel={"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
        ),
        VOCAB_SIZE,
    )
)


def test_json_brings_it_back() -> None:
    assert plan_from_dict(json.loads(json.dumps(_PLAN.to_dict()))) == _PLAN


@pytest.mark.parametrize("values", [{}, {"stages": [{}]}, {"stages": None}, {"stages": [{"index": 0}]}])
def test_something_else_is_refused(values: dict) -> None:
    with pytest.raises(ValueError, match="not a plan of stages"):
        plan_from_dict(values)


def test_the_stage_of_a_step() -> None:
    assert [_PLAN.stage_at(step).index for step in (0, 5, 6, 11, 12, 19, 20, 99)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert _PLAN.num_steps == 20


def test_chunks_take_turns_in_the_order_of_the_layers() -> None:
    parallel = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_size=2)
    stage = _PLAN.stages[2]
    assert stage.layout == (2, 2, 2, 1)
    chunks = [list(stage.layers_of(rank_chunks(parallel, rank)[virtual])) for virtual in range(2) for rank in range(2)]
    assert chunks == [[0, 1], [2, 3], [4, 5], [6]]


@given(st.integers(1, 100), st.integers(1, 12))
def test_even_layouts_hold_all_layers(num_layers: int, chunks: int) -> None:
    layout = even_layout(num_layers, chunks)
    assert sum(layout) == num_layers
    assert len(layout) == chunks
    assert max(layout) - min(layout) <= 1
    assert list(layout) == sorted(layout, reverse=True)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0.01, 1.0))
def test_stages_follow_one_another(budgets: list[int], grow_at: float) -> None:
    steps = first_steps(budgets, [grow_at] * (len(budgets) - 1) + [1.0])
    assert steps[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(steps))
    assert all(1 <= end - start <= budget for (start, end), budget in zip(steps, budgets))
    assert steps[-1][1] - steps[-1][0] == budgets[-1]

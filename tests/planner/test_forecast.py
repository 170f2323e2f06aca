"""A plan's bytes and seconds follow from its stages', and a plan is read back from its file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import plan_from_dict
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.planner.forecast import check_fits, forecast, plan_and_forecast, vanilla_config, with_plan
from megatron_step.planner.plan import make_plan

STAGED = small_config(
    model={"num_layers": 6}, stages={"count": 2, "layers": [4, 2]}, parallel={"pipeline_parallel_size": 2}
)


def cluster_of(gib: float) -> Cluster:
    return Cluster([NodeGroup(count=1, gpus_per_node=2, memory_gib=gib)], teraflops=1)


def test_the_json_has_all_that_users_look_for() -> None:
    found = forecast(resolve(STAGED, VOCAB_SIZE), cluster_of(1))
    values = json.loads(json.dumps(found.to_dict()))
    assert {"status", "objective", "bound", "stages", "peak_bytes", "vanilla_peak_bytes", "reduction"} <= values.keys()
    assert values["status"] == "optimal"
    for index, (stage, of_stage) in enumerate(zip(found.plan.stages, values["stages"])):
        assert (of_stage["index"], of_stage["num_layers"]) == (index, stage.num_layers)
        assert (of_stage["new_layers"], of_stage["layout"]) == (stage.num_new_layers, list(stage.layout))
        memory = stage_memory(resolve(STAGED, VOCAB_SIZE), stage)
        for pp_rank, (rank, needed) in enumerate(zip(of_stage["ranks"], memory)):
            assert rank["pp_rank"] == pp_rank
            assert rank["old_layers"] + rank["new_layers"] == stage.layout[pp_rank]
            in_growth = needed.model_state_bytes + rank["growth_bytes"]
            assert rank["total_bytes"] == max(sum(rank["bytes"].values()), in_growth)
            assert sum(rank["bytes"].values()) == needed.peak_bytes
            assert (rank["growth_bytes"] > 0) == (index > 0)
            assert rank["capacity_bytes"] == 2**30
        assert sum(rank["new_layers"] for rank in of_stage["ranks"]) == stage.num_new_layers
    assert values["peak_bytes"] == max(rank["total_bytes"] for stage in values["stages"] for rank in stage["ranks"])
    assert values["reduction"] == 1 - values["peak_bytes"] / values["vanilla_peak_bytes"]
    assert values["objective"] == pytest.approx(values["peak_bytes"] / 2**30, rel=4e-3)


@pytest.mark.parametrize(
    ("planner", "named"),
    [
        ({"attention": "unfused"}, "planner.attention unfused: megatron-step plan takes this, training does not"),
        (
            {"attention": "unfused", "recipe": "paper"},
            "planner.attention unfused, planner.recipe paper: megatron-step plan takes this, training does not",
        ),
    ],
)
def test_training_refuses_what_it_does_not_have(planner: dict[str, str], named: str) -> None:
    config = small_config(training={"precision": "bf16"}, planner=planner)
    assert forecast(resolve(config, VOCAB_SIZE)).peak_bytes > 0
    with pytest.raises(ValueError, match=named):
        plan_and_forecast(resolve(config, VOCAB_SIZE))


def test_a_plan_comes_back_from_its_json() -> None:
    found = forecast(resolve(STAGED, VOCAB_SIZE))
    assert plan_from_dict(json.loads(json.dumps(found.to_dict()))) == found.plan


def test_vanilla_training_has_all_layers_and_as_many_steps() -> None:
    plan = make_plan(resolve(STAGED, VOCAB_SIZE))
    (stage,) = make_plan(resolve(vanilla_config(STAGED, plan), VOCAB_SIZE)).stages
    assert (stage.num_layers, stage.num_new_layers, stage.last_step) == (6, 6, plan.num_steps)


def test_shares_and_seconds_follow_the_machines() -> None:
    found, faster = (forecast(resolve(STAGED, VOCAB_SIZE), replace(cluster_of(1), teraflops=speed)) for speed in (1, 2))
    assert found.seconds == pytest.approx(2 * faster.seconds)
    assert found.stages[0].seconds == found.stages[0].step_seconds * 8
    assert found.stages[1].fullest.share == max(rank.memory.peak_bytes for rank in found.stages[1].ranks) / 2**30


def test_what_does_not_fit_is_said() -> None:
    found = forecast(resolve(STAGED, VOCAB_SIZE), cluster_of(1e-3))
    assert found.status == "infeasible"
    with pytest.raises(ValueError, match=r"stage 1 needs 0.00 GiB on pipeline rank [01], 0.00 GiB more than it has"):
        check_fits(found)


@pytest.mark.parametrize("parallel", [{}, {"pipeline_parallel_size": 4}, {"pipeline_parallel_size": 3}])
def test_a_stage_of_no_steps_holds_nothing(parallel: dict[str, int]) -> None:
    """All of its layers would be trained: it is a model trained before, which is never built."""
    stages = {"count": 2, "layers": [3, 1], "steps": [0, 10], "start_from": "somewhere"}
    config = small_config(stages=stages, parallel=parallel)
    need = forecast(resolve(config, VOCAB_SIZE)).stages[1].peak_bytes
    machines = Cluster([NodeGroup(count=1, gpus_per_node=4, memory_gib=need / 2**30)])
    found = forecast(resolve(config, VOCAB_SIZE), machines)
    assert (found.status != "infeasible", found.peak_bytes, found.stages[0].peak_bytes) == (True, need, 0)
    assert found.seconds == found.stages[1].seconds
    check_fits(found)
    values = found.to_dict()
    assert values["objective"] == pytest.approx(1.0, rel=4e-3)
    assert all(
        rank["total_bytes"] == rank["checkpoint_host_bytes"] == rank["load_host_bytes"] == 0
        for rank in values["stages"][0]["ranks"]
    )
    smaller = Cluster([NodeGroup(count=1, gpus_per_node=4, memory_gib=0.9 * need / 2**30)])
    assert forecast(resolve(config, VOCAB_SIZE), smaller).status == "infeasible"


def test_a_run_takes_the_plan_of_a_file(tmp_path: Path) -> None:
    given = replace(STAGED, stages=replace(STAGED.stages, layers=[3, 3], layouts=[[1, 2], [4, 2]]))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(forecast(resolve(given, VOCAB_SIZE)).to_dict()))
    free = replace(
        STAGED, stages=replace(STAGED.stages, layers="auto"), planner=replace(STAGED.planner, plan=str(path))
    )
    plan = plan_and_forecast(resolve(free, VOCAB_SIZE)).plan
    assert [stage.layout for stage in plan.stages] == [(1, 2), (4, 2)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the plan"),
        ("{", "is not a plan that megatron-step plan wrote"),
        ('{"stages": [{"index": 0}]}', "is not a plan that megatron-step plan wrote"),
        ("[]", "is not a plan that megatron-step plan wrote"),
    ],
)
def test_files_without_a_plan(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        with_plan(STAGED, path)


def test_the_plan_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(forecast(resolve(STAGED, VOCAB_SIZE)).to_dict()))
    with pytest.raises(ValueError, match=r"of another run: it adds \[4, 2\] layers, but stages.count is 1"):
        with_plan(small_config(), path)
    other = replace(STAGED, stages=replace(STAGED.stages, layers=[3, 3]))
    with pytest.raises(ValueError, match=r"stages.layers \[3, 3\] differ from \[4, 2\] in the plan"):
        with_plan(other, path)

"""The planner's choice is what trying all depths and all layouts finds, by the memory and the time that plans have."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.config.run import RunConfig
from megatron_step.plan.names import layer_of
from megatron_step.plan.old_layers import Policy, Treatment, register
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import Stage
from megatron_step.planner.costs.stage_costs import stage_costs
from megatron_step.planner.forecast import StageForecast, forecast
from megatron_step.planner.plan import make_plan
from megatron_step.planner.search.depths import growths

GPU = NodeGroup(count=1, gpus_per_node=1, memory_gib=1.0)


def splits(num_layers: int, parts: int) -> list[list[int]]:
    return [np.diff([0, *ends, num_layers]).tolist() for ends in combinations(range(1, num_layers), parts - 1)]


def stages_of_all_plans(config: RunConfig, cluster: Cluster | None) -> Iterator[list[list[StageForecast]]]:
    """Return the stages of all depths in all of their layouts."""
    pipeline, count = config.parallel.pipeline_parallel_size, config.stages.count
    num_layers = config.model.num_layers
    seen: dict[tuple[int, int, int], list[StageForecast]] = {}
    for inner in combinations(range(pipeline, num_layers), count - 1):
        depths = (*inner, num_layers)
        per_stage = []
        for index, growth in enumerate(growths(depths)):
            key = (index, *growth)
            if key not in seen:
                layouts = [splits(depth, pipeline) for depth in depths]
                seen[key] = [
                    _forecast(config, depths, [*layouts_before, layout], index, cluster)
                    for layout in layouts[index]
                    for layouts_before in [[of_stage[0] for of_stage in layouts[:index]]]
                ]
            per_stage.append(seen[key])
        yield per_stage


def _forecast(
    config: RunConfig, depths: tuple[int, ...], layouts: list[list[int]], index: int, cluster: Cluster | None
) -> StageForecast:
    rest = [splits(depth, config.parallel.pipeline_parallel_size)[0] for depth in depths[index + 1 :]]
    stages = replace(config.stages, layers=np.diff([0, *depths]).tolist(), layouts=[*layouts, *rest])
    return forecast(resolve(replace(config, stages=stages), VOCAB_SIZE), cluster).stages[index]


def share(stage: StageForecast) -> float:
    return stage.fullest.share


@settings(max_examples=40, deadline=None)
@given(
    num_layers=st.integers(3, 6),
    count=st.integers(1, 3),
    pipeline=st.integers(1, 3),
    position=st.sampled_from(["upper", "intermediate", "lower", "random"]),
    tied=st.booleans(),
    recompute=st.sampled_from(["none", "full"]),
    memory=st.lists(st.sampled_from([0.5, 0.75, 1.0]), min_size=3, max_size=3),
    objective=st.sampled_from(["memory", "memory_then_time", "time"]),
)
def test_the_same_as_trying_all(
    num_layers: int,
    count: int,
    pipeline: int,
    position: str,
    tied: bool,
    recompute: str,
    memory: list[float],
    objective: str,
) -> None:
    num_layers = max(num_layers, pipeline + count - 1)
    cluster = Cluster([replace(GPU, memory_gib=gib, relative_speed=gib) for gib in memory[:pipeline]])
    config = small_config(
        model={"num_layers": num_layers, "tie_embeddings": tied},
        stages={"count": count},
        growth={"position": position},
        parallel={"pipeline_parallel_size": pipeline, "recompute": recompute, "distributed_optimizer": False},
        planner={"objective": objective, "cluster": "given"},
    )
    found = forecast(resolve(config, VOCAB_SIZE), cluster)
    assert found.status == ("given" if count == pipeline == 1 else "optimal")
    # Without the distributed optimizer nothing is padded: the program's bytes are the plan's, exactly.
    all_plans = list(stages_of_all_plans(config, cluster))
    least = min(max(min(map(share, layouts)) for layouts in plan) for plan in all_plans)
    limit = (1.0 if objective == "time" else least) * (1 + 1e-9)
    assert max(map(share, found.stages)) <= limit
    if objective != "memory":
        fastest = min(
            sum(min((stage.seconds for stage in layouts if share(stage) <= limit), default=np.inf) for layouts in plan)
            for plan in all_plans
        )
        assert found.seconds <= fastest * (1 + 1e-9)


def test_of_equally_good_plans_the_model_is_deep_early() -> None:
    """A wide vocabulary: the output layer alone decides the peak, and layers can come when they like."""
    config = small_config(model={"num_layers": 6, "vocab_size": 20000}, stages={"count": 3})
    free = make_plan(resolve(config, 20000))
    others = [
        make_plan(resolve(replace(config, stages=replace(config.stages, layers=list(layers))), 20000))
        for layers in product(range(1, 5), repeat=3)
        if sum(layers) == 6
    ]
    peaks = {plan: max(map(share, forecast_of(config, plan))) for plan in others}
    assert free.solution is not None
    as_good = [plan for plan, peak in peaks.items() if peak <= free.solution.objective * 1.001]
    assert sum(stage.num_layers for stage in free.stages) == max(
        sum(stage.num_layers for stage in plan.stages) for plan in as_good
    )


def forecast_of(config: RunConfig, plan: object) -> tuple[StageForecast, ...]:
    layers = [stage.num_new_layers for stage in plan.stages]  # type: ignore[attr-defined]
    return forecast(resolve(replace(config, stages=replace(config.stages, layers=layers)), 20000)).stages


def test_each_layout_is_the_fastest_within_the_share_of_the_plan() -> None:
    """The other ranks share their layers evenly if the first rank determines the peak."""
    config = small_config(
        model={"num_layers": 9}, parallel={"pipeline_parallel_size": 3}, training={"global_batch_size": 32}
    )
    found = forecast(resolve(config, VOCAB_SIZE))
    alternatives = [
        forecast(resolve(replace(config, stages=replace(config.stages, layouts=[layout])), VOCAB_SIZE)).stages[0]
        for layout in splits(9, 3)
    ]
    assert found.plan.solution is not None
    within = [stage for stage in alternatives if share(stage) <= found.plan.solution.objective * 1.004]
    assert found.stages[0].step_seconds == pytest.approx(min(stage.step_seconds for stage in within))


@pytest.mark.parametrize("objective", ["memory", "memory_then_time", "time"])
@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 2), (4, 2), (2, 3)])
def test_interleaved_pipelines_are_planned_with_a_bound(objective: str, pipeline: int, virtual: int) -> None:
    config = small_config(
        model={"num_layers": 14},
        stages={"count": 3},
        parallel={"pipeline_parallel_size": pipeline, "virtual_pipeline_size": virtual},
        planner={"time_limit": 4.0, "objective": objective, "cluster": "given"},
    )
    found = forecast(resolve(config, VOCAB_SIZE), Cluster([replace(GPU, gpus_per_node=4)]))
    assert found.plan.solution is not None
    assert 0 < found.plan.solution.bound <= found.plan.solution.objective
    for stage in found.stages:
        assert len(stage.stage.layout) == pipeline * virtual
        assert objective == "time" or share(stage) <= found.plan.solution.objective * 1.004


@pytest.mark.parametrize("objective", ["memory", "memory_then_time", "time"])
@pytest.mark.parametrize("pipeline", [1, 3])
def test_a_stage_of_no_steps_costs_nothing(objective: str, pipeline: int) -> None:
    """The best plan is one of a single new layer on a model as deep as can be: nothing of that model is trained."""
    config = small_config(
        model={"num_layers": 6},
        stages={"count": 2, "steps": [0, 10], "start_from": "somewhere"},
        parallel={"pipeline_parallel_size": pipeline},
        planner={"objective": objective, "cluster": "given"},
    )
    machines = Cluster([replace(GPU, gpus_per_node=3)])
    found = forecast(resolve(config, VOCAB_SIZE), machines)
    given = [
        forecast(
            resolve(replace(config, stages=replace(config.stages, layers=[old, 6 - old])), VOCAB_SIZE), machines
        ).stages[1]
        for old in range(1, 6)
    ]
    solution = found.plan.solution
    assert solution is not None
    if objective == "time":
        assert solution.objective == pytest.approx(found.seconds)
    else:
        assert solution.objective == pytest.approx(min(stage.peak_bytes for stage in given) / 2**30, rel=4e-3)


def test_stack_is_planned_in_whole_repetitions() -> None:
    config = small_config(model={"num_layers": 12}, stages={"count": 3}, growth={"operator": "stack", "init": "copy"})
    depths = [stage.num_layers for stage in make_plan(resolve(config, VOCAB_SIZE)).stages]
    assert depths[-1] == 12
    assert all(after % before == 0 for before, after in pairwise(depths))
    possible = ([1, 1, 10], [2, 2, 8], [3, 3, 6], [1, 2, 9], [1, 3, 8], [1, 5, 6], [2, 4, 6])
    given = [replace(config, stages=replace(config.stages, layers=layers)) for layers in possible]
    least = min(forecast(resolve(plan, VOCAB_SIZE)).peak_bytes for plan in given)
    assert forecast(resolve(config, VOCAB_SIZE)).peak_bytes == least


def test_a_depth_that_an_operator_cannot_reach() -> None:
    config = small_config(model={"num_layers": 7}, stages={"count": 3}, growth={"operator": "stack", "init": "copy"})
    with pytest.raises(ValueError, match="stack adds whole repetitions .*cannot grow a model to 7 layers in 3 stages"):
        make_plan(resolve(config, VOCAB_SIZE))


@pytest.mark.parametrize("objective", ["memory", "memory_then_time"])
@pytest.mark.parametrize(
    ("num_layers", "count", "sections", "new_layers"),
    [
        (9, 3, {}, [4, 3, 2]),
        (4, 2, {}, [2, 2]),
        (24, 3, {}, [11, 8, 5]),
        (12, 3, {"growth": {"operator": "stack", "init": "copy"}}, [3, 3, 6]),
        (6, 4, {"parallel": {"pipeline_parallel_size": 3}}, [3, 1, 1, 1]),
        (7, 2, {"growth": {"operator": "stack", "init": "copy"}}, [1, 6]),
    ],
)
def test_where_old_layers_save_nothing_each_stage_adds_fewer_layers(
    num_layers: int, count: int, sections: dict[str, Any], new_layers: list[int], objective: str
) -> None:
    config = small_config(
        model={"num_layers": num_layers},
        stages={"count": count},
        old_layers={"policy": "trained"},
        planner={"objective": objective},
        **sections,
    )
    assert [stage.num_new_layers for stage in make_plan(resolve(config, VOCAB_SIZE)).stages] == new_layers


def test_too_few_layers_are_refused() -> None:
    config = small_config(stages={"count": 3}, parallel={"pipeline_parallel_size": 3})
    with pytest.raises(
        ValueError, match="4 layers cannot be split into 3 stages on 3 pipeline chunks: .* to at least 5"
    ):
        make_plan(resolve(config, VOCAB_SIZE))


def test_a_cluster_that_is_too_small_for_any_plan() -> None:
    config = small_config(stages={"count": 2}, planner={"objective": "time", "cluster": "given"})
    cluster = Cluster([replace(GPU, memory_gib=1e-4)])
    with pytest.raises(ValueError, match=r"no plan that fits the memory of the cluster.*megatron-step plan --explain"):
        make_plan(resolve(config, VOCAB_SIZE), cluster=cluster)


class Alternating(Policy):
    """Trains every second old layer."""

    name = "alternating"
    period = 2

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        return Treatment(layer_of(key) % 2 == 0, "base", stage.index)


def test_old_layers_that_differ_count_with_their_mean_and_prove_nothing() -> None:
    register(Alternating())
    costs = {}
    for policy in ("frozen", "trained", "alternating"):
        config = small_config(stages={"count": 2}, freeze={"norms": True}, old_layers={"policy": policy})
        costs[policy] = stage_costs(resolve(config, VOCAB_SIZE), first=False).old
    for field in ("state_bytes", "flops", "reduced_bytes"):
        frozen, trained, mean = (getattr(costs[policy], field) for policy in ("frozen", "trained", "alternating"))
        # Under freeze.norms the policy `trained` freezes two norms of 64 weights that the other one trains.
        assert mean == pytest.approx((frozen + trained) / 2, rel=0.01)
    solution = make_plan(resolve(config, VOCAB_SIZE)).solution
    assert solution is not None
    assert (solution.status, solution.bound) == ("feasible", 0.0)

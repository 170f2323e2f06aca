"""The Pareto front holds what nothing beats, and the figure is drawn."""

from pathlib import Path

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.plan.resolved import resolve
from megatron_step.report.sweep import Candidate, candidate, front_table, pareto_front, plot, variants

CLUSTER = Cluster([NodeGroup(count=1, gpus_per_node=2, memory_gib=1.0)])
CONFIG = small_config(training={"global_batch_size": 8})


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    found = [candidate(variant, CLUSTER) for variant in variants(resolve(CONFIG, VOCAB_SIZE, 2), CLUSTER)]
    return [item for item in found if item is not None]


def test_layouts_and_numbers_of_stages_are_tried(candidates: list[Candidate]) -> None:
    layouts = {
        (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, item.resolved.dp_size)
        for item in candidates
        for parallel in [item.resolved.config.parallel]
    }
    assert layouts == {(1, 1, 2), (2, 1, 1), (1, 2, 1)}
    assert {len(item.forecast.plan.stages) for item in candidates} == {1, 2, 3, 4}
    assert {item.resolved.config.parallel.recompute for item in candidates} == {"none", "selective", "full"}


def test_recipes_of_model_states_are_tried_for_bf16_weights() -> None:
    config = small_config(training={"global_batch_size": 8, "precision": "bf16"})
    found = list(variants(resolve(config, VOCAB_SIZE, 2), CLUSTER))
    assert {variant.config.optimizer.states for variant in found} == {"full", "compact"}
    named = small_config(training={"precision": "bf16"}, planner={"recipe": "paper"})
    assert {variant.config.optimizer.states for variant in variants(resolve(named, VOCAB_SIZE, 2), CLUSTER)} == {"full"}


def test_nothing_beats_the_front_and_all_else_is_beaten(candidates: list[Candidate]) -> None:
    front = pareto_front(candidates)

    def beats(one: Candidate, other: Candidate) -> bool:
        ours, theirs = ((item.forecast.peak_bytes, item.step_seconds) for item in (one, other))
        return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]

    for item in candidates:
        equal = any(
            (item.forecast.peak_bytes, item.step_seconds) == (other.forecast.peak_bytes, other.step_seconds)
            for other in front
        )
        assert equal != any(beats(other, item) for other in front)


def test_a_line_for_each_plan_of_the_front(candidates: list[Candidate]) -> None:
    front = pareto_front(candidates)
    heading, *lines = front_table(front).splitlines()
    assert "recompute" in heading
    assert len(lines) == len(front)


def test_the_figure_is_a_png(candidates: list[Candidate], tmp_path: Path) -> None:
    path = tmp_path / "pareto.png"
    plot(candidates, pareto_front(candidates), path, {"a line": 2.0**20})
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]

"""The benchmark compares the plan with the memory of ranks in real process groups."""

from benchmarks import memory
from benchmarks.memory import CASES, Case


def test_the_grid_is_wide() -> None:
    assert len(CASES) >= 24
    assert {case.world_size for case in CASES} == {1, 2, 4, 8}
    layouts = [case.layout or {} for case in CASES]
    for key in ("tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_size", "recompute"):
        assert sum(key in layout for layout in layouts) >= 3


def test_planned_states_are_measured_ones_and_the_peak_is_near() -> None:
    (row,) = memory.run([Case(2, layout={"pipeline_parallel_size": 2}, layers=(7, 1))])
    assert (row["ranks"], row["stages"]) == (2, 2)
    assert abs(row["states"]) < 0.1
    assert 0 <= row["peak_least"] <= row["peak_most"] < 3


def test_a_config_is_described_by_what_is_special() -> None:
    case = Case(4, "fp32", {"tensor_parallel_size": 2, "sequence_parallel": True, "recompute": "full"})
    assert memory.describe(case) == "fp32 TP2 SP full"

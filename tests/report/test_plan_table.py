"""The table of a plan shows each stage beside vanilla training."""

import re

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.planner.forecast import forecast
from megatron_step.report.plan_table import rank_table, stage_table
from megatron_step.report.text_table import format_bytes


def test_a_line_for_each_stage_and_for_vanilla() -> None:
    stages = {"count": 2, "layers": [3, 1], "layouts": "even"}
    config = small_config(stages=stages, parallel={"pipeline_parallel_size": 2}, steps=8)
    found = forecast(resolve(config, VOCAB_SIZE))
    headers, *lines = (re.split(" {2,}", line.strip()) for line in stage_table(found).splitlines())
    assert [line[: headers.index("frozen")] for line in lines] == [
        ["1", "3", "6", "2/1"],
        ["2", "3+1", "8", "2/2"],
        ["vanilla", "4", "14", "2/2"],
    ]
    for stage, line in zip(found.plan.stages, lines):
        heaviest = max(stage_memory(resolve(config, VOCAB_SIZE), stage), key=lambda memory: memory.peak_bytes)
        shown = dict(zip(headers, line))
        assert shown["states"] == format_bytes(heaviest.model_state_bytes)
        assert shown["activations"] == format_bytes(heaviest.activation_bytes)
        assert shown["peak"] == format_bytes(heaviest.peak_bytes)
        assert shown["slack"] == "-"
    assert [line[headers.index("peak/vanilla")] for line in lines][-1] == "100.0%"
    times = [float(line[headers.index("share of time")].rstrip("%")) for line in lines[:-1]]
    assert sum(times) == pytest.approx(100, abs=0.2)


def test_what_is_left_of_the_memory_is_shown() -> None:
    cluster = Cluster([NodeGroup(count=1, gpus_per_node=1, memory_gib=1)])
    found = forecast(resolve(small_config(), VOCAB_SIZE), cluster)
    left = format_bytes(2**30 - found.peak_bytes)
    assert left in stage_table(found)
    assert _last_cells(rank_table(found))[0] == left
    small = forecast(
        resolve(small_config(), VOCAB_SIZE), Cluster([NodeGroup(count=1, gpus_per_node=1, memory_gib=1e-3)])
    )
    assert _last_cells(rank_table(small))[0].startswith("-")


def _last_cells(table: str) -> list[str]:
    """What is left of the first rank's memory, and what a save and a load need on its host."""
    return re.split(" {2,}", table.splitlines()[1])[-3:]


def test_what_saves_and_loads_need_is_shown() -> None:
    found = forecast(resolve(small_config(), VOCAB_SIZE))
    host = found.stages[0].ranks[0].host
    assert _last_cells(rank_table(found)) == ["-", format_bytes(host.save_bytes), format_bytes(host.load_bytes)]


def test_states_at_rest_are_shown_where_there_are_some() -> None:
    stages = {"count": 2, "layers": [3, 1], "steps": 40}
    found = forecast(resolve(small_config(stages=stages, old_layers={"policy": "rotate"}), VOCAB_SIZE))
    table = rank_table(found).splitlines()
    (rank,) = found.stages[1].ranks
    assert table[0].endswith("host at rest")
    assert table[2].endswith(f" {format_bytes(rank.host.resting_bytes)}") and rank.host.resting_bytes > 0


def test_a_line_for_each_rank_of_each_stage() -> None:
    stages = {"count": 2, "layers": [3, 1], "layouts": "even"}
    config = small_config(stages=stages, parallel={"pipeline_parallel_size": 2})
    lines = [line.split()[:3] for line in rank_table(forecast(resolve(config, VOCAB_SIZE))).splitlines()[1:]]
    assert [line[:2] for line in lines] == [["1", "0"], ["1", "1"], ["2", "0"], ["2", "1"]]
    assert lines[0][2] == "0+2"


def test_a_stage_of_no_steps_has_no_numbers() -> None:
    stages = {"count": 2, "layers": [3, 1], "steps": [0, 8], "start_from": "somewhere"}
    found = forecast(resolve(small_config(stages=stages), VOCAB_SIZE))
    first = stage_table(found).splitlines()[1]
    assert first.split() == ["1", "3", "0", *["-"] * 14]
    assert [line.split()[0] for line in rank_table(found).splitlines()[1:]] == ["2"]


def test_vanilla_training_is_its_own_measure() -> None:
    stage, vanilla = stage_table(forecast(resolve(small_config(), VOCAB_SIZE, 2))).splitlines()[1:]
    assert stage.split()[1:] == vanilla.split()[1:]


def test_columns_are_aligned() -> None:
    config = small_config(stages={"count": 3, "layers": [2, 1, 1]})
    assert len({len(line) for line in stage_table(forecast(resolve(config, VOCAB_SIZE))).splitlines()}) == 1

"""The table of a plan shows each stage beside vanilla training."""

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.planner.memory import stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.planner.table import format_bytes, stage_table


def test_a_line_for_each_stage_and_for_vanilla() -> None:
    config = small_config(stages={"count": 2, "layers": [3, 1]}, parallel={"pipeline_parallel_size": 2}, steps=8)
    plan = make_plan(config, VOCAB_SIZE)
    headers, *lines = (line.split("  ") for line in stage_table(config, plan, VOCAB_SIZE, dp_size=1).splitlines())
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    names = [cell.strip() for cell in headers if cell.strip()]
    assert [row[: names.index("frozen")] for row in rows] == [
        ["1", "3", "6", "2/1"],
        ["2", "3+1", "8", "2/2"],
        ["vanilla", "4", "14", "2/2"],
    ]
    for stage, row in zip(plan.stages, rows):
        heaviest = max(stage_memory(config, stage, VOCAB_SIZE, 1), key=lambda memory: memory.peak_bytes)
        shown = dict(zip(names, row))
        assert shown["states"] == format_bytes(heaviest.model_state_bytes)
        assert shown["activations"] == format_bytes(heaviest.activation_bytes)
        assert shown["peak"] == format_bytes(heaviest.peak_bytes)
    vanilla = dict(zip(names, rows[-1]))
    assert (vanilla["states/vanilla"], vanilla["peak/vanilla"]) == ("100.0%", "100.0%")
    assert float(dict(zip(names, rows[1]))["states/vanilla"].rstrip("%")) < 100


def test_vanilla_training_is_its_own_measure() -> None:
    config = small_config()
    stage, vanilla = stage_table(config, make_plan(config, VOCAB_SIZE), VOCAB_SIZE, dp_size=2).splitlines()[1:]
    assert stage.split()[1:] == vanilla.split()[1:]


def test_columns_are_aligned() -> None:
    config = small_config(stages={"count": 3, "layers": [2, 1, 1]})
    lines = stage_table(config, make_plan(config, VOCAB_SIZE), VOCAB_SIZE, dp_size=1).splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MiB"), (3 * 2**19, "1.5 MiB"), (2**30, "1.00 GiB"), (5 * 2**29, "2.50 GiB")]
)
def test_bytes_have_readable_units(count: int, text: str) -> None:
    assert format_bytes(count) == text

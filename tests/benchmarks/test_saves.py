"""Saves and loads add what is planned, in worlds of four processes."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks import saves
from benchmarks.memory import Case, case_config
from benchmarks.world import in_world
from megatron_step.config.run import RunConfig

TOLERANCE_MIB = 24
"""Memory of the interpreter and the libraries, whatever the model's size."""
ASYNCHRONOUS = {"checkpoint": {"asynchronous": True}}
CASES = (
    Case(4, "fp32", {"pipeline_parallel_size": 4}, (4,)),
    Case(4, "fp32", {"pipeline_parallel_size": 4}, (4,), ASYNCHRONOUS),
    Case(4, "fp32", {"pipeline_parallel_size": 2}, (4,), ASYNCHRONOUS),
)


def test_saves_and_loads_add_what_is_planned() -> None:
    """Gradients would add 28 MiB to an asynchronous save's writer at PP 4, and 54 MiB at PP 2."""
    model = replace(saves.MODEL, num_layers=4, vocab_size=256, seq_length=16)
    # New processes: those of other tests hold freed memory, which a fork shares and training changes.
    ranks = in_world(4, measure_all, [case_config(case, model) for case in CASES])
    at_once, *meanwhile = (saves.compare(case, measured) for case, measured in zip(CASES, zip(*ranks)))
    assert at_once["save_added"] < TOLERANCE_MIB
    assert at_once["load_above"] < TOLERANCE_MIB
    for row in meanwhile:
        assert row["save_planned"] > 3 * TOLERANCE_MIB
        assert 0.5 * row["save_planned"] < row["save_added"]
        assert row["save_above"] < TOLERANCE_MIB
        assert row["load_above"] < TOLERANCE_MIB


# What the ranks run.


def measure_all(configs: Sequence[RunConfig]) -> list[saves.Measured]:
    return [saves.measure(config) for config in configs]

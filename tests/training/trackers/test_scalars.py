"""Plots get the numbers of a step that are worth one."""

from megatron_step.training.trackers.scalars import is_plotted, scalars


def test_floats_and_bytes_are_plotted() -> None:
    memory = {"peak_bytes": 8, "ranks": [{"measured": 1}]}
    assert scalars({"step": 3, "loss": 2.0, "name": "x", "memory": memory}) == {"loss": 2.0, "memory/peak_bytes": 8}


def test_shown_and_evaluated_steps_are_plotted() -> None:
    assert is_plotted({"step": 1}, True)
    assert is_plotted({"step": 1, "validation_loss": 2.0}, False)
    assert not is_plotted({"step": 1}, False)

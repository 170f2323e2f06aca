"""`megatron-step report` prints the table, draws the plot, and refuses what is no run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

_LINE = {"step": 1, "stage_index": 0, "tokens": 10, "loss": 2.5, "tokens_per_second": 5.0}


def test_table_and_plot(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(_LINE) + "\n")
    assert command("report", tmp_path, "--output", tmp_path / "report.png") == 0
    shown = capsys.readouterr().out
    assert "2.5000" in shown
    assert "2.000 s" in shown, "the time of a step, in the table of the stages"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "error: nowhere is not the output folder"), (["x", "--output", "x.pdf"], "must end in .png")],
)
def test_bad_input(command: Callable, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert command("report", *arguments) == 2
    assert message in capsys.readouterr().err

"""`megatron-step report` prints the table, draws the plot, and refuses what is no run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_step.engine.output_lock import lock_beside, output_lock

_LINE = {"step": 1, "stage_index": 0, "tokens": 10, "loss": 2.5, "tokens_per_second": 5.0}


def test_table_and_plot(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(_LINE) + "\n")
    assert command("report", tmp_path, "--output", tmp_path / "report.png") == 0
    shown = capsys.readouterr().out
    assert "2.5000" in shown
    assert "2.000 s" in shown, "the time of a step, in the table of the stages"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_another_process_draws_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(_LINE) + "\n")
    plot = tmp_path / "report.png"
    with output_lock(lock_beside(plot), plot):
        found = subprocess.run(
            [sys.executable, "-m", "megatron_step", "report", tmp_path, "--output", plot],
            capture_output=True,
            text=True,
            check=False,
        )
    assert found.returncode == 2
    assert f"{plot} is in use by process {os.getpid()} on" in found.stderr
    assert not plot.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "error: nowhere is not the output folder"), (["x", "--output", "x.pdf"], "must end in .png")],
)
def test_bad_input(command: Callable, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert command("report", *arguments) == 2
    assert message in capsys.readouterr().err

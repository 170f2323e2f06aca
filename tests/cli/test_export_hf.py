"""`megatron-step export-hf` writes a run's model, checks it, and refuses bad input with one line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.training.run import run


def test_a_run_is_exported_and_checked(
    command: Callable, tmp_path: Path, small_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small_config(str(tmp_path / "run"), data=small_data, steps=1))
    capsys.readouterr()
    assert command("export-hf", tmp_path / "run", tmp_path / "out", "--check") == 0
    shown = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out'}\n" in shown
    assert "top-1 agreement 100.00 %" in shown
    card = (tmp_path / "out/README.md").read_text()
    stage = re.compile(r"\| 1 \| 4 \| 1 \| 256 \| [56]\.\d+ \| 5\.\d+ \|")  # with the losses of the run's metrics
    assert stage.search(card)
    assert command("export-hf", tmp_path / "run/checkpoints/step_00000001", tmp_path / "two", "--dtype", "float16") == 0
    assert stage.search((tmp_path / "two/README.md").read_text())


def test_bad_input(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export-hf", tmp_path / "nowhere", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert "error: there is no checkpoint" in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

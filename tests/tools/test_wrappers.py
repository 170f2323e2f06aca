"""Each tool but benchmark.py is a command of `megatron-step`, started from a clone."""

import runpy
import sys
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

WRAPPERS = sorted(path for path in (REPOSITORY / "tools").glob("*.py") if path.name != "benchmark.py")


@pytest.mark.parametrize("path", WRAPPERS, ids=lambda path: path.name)
def test_a_tool_is_a_command(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")
    assert path.read_text().count("\n") <= 10, "the command's work stands in megatron_step/cli"

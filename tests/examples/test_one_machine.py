"""The script for one machine trains, and goes on when it is started again."""

import json
from collections.abc import Callable
from pathlib import Path


def test_trains_with_two_processes(tmp_path: Path, tiny: list[str], run_script: Callable) -> None:
    overrides = [*tiny, "--output_dir", str(tmp_path), "--stages.steps", "4"]
    finished = run_script(["examples/one_machine/run.sh", "2", *overrides])
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "validation_loss" in lines[-1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]

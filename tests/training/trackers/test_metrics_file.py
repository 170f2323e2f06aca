"""metrics.jsonl has every step once, also after a crash."""

import json
from pathlib import Path

import torch
from file_size_limit import file_size_limit
from small_run import small_config

from megatron_step.training.trackers.metrics_file import MetricsFile
from megatron_step.training.trackers.tracker import TrackedRun


def _write(output: Path, first_step: int, last_step: int, **extra: object) -> None:
    file = MetricsFile(TrackedRun(small_config(str(output)), num_steps=10, first_step=first_step))
    for step in range(first_step + 1, last_step + 1):
        file.write({"step": step, "loss": 1 / step, **extra}, shown=False)
    file.close()


def _lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_a_line_with_all_digits(tmp_path: Path) -> None:
    _write(tmp_path, 0, 7)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 8))
    assert _lines(tmp_path)[2]["loss"] == 1 / 3


def test_steps_that_are_trained_again_are_dropped(tmp_path: Path) -> None:
    _write(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')  # cut off by a crash
    _write(tmp_path, 5, 8)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 9))


def test_a_line_without_its_end_is_dropped(tmp_path: Path) -> None:
    _write(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3}')
    _write(tmp_path, 3, 4)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 4]


def test_a_full_disk_has_room_to_drop_lines(tmp_path: Path) -> None:
    _write(tmp_path, 0, 7)
    with file_size_limit(0):  # nothing at all can be written
        _write(tmp_path, 5, 5)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 6))


def test_values_that_a_hook_adds_have_a_form(tmp_path: Path) -> None:
    _write(tmp_path, 0, 1, norm=torch.tensor(0.5), place=Path("here"))
    assert _lines(tmp_path)[0]["norm"] == 0.5
    assert _lines(tmp_path)[0]["place"] == "here"

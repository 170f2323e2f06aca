"""`megatron-step train` trains with one process, and says how to start several."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_text


def test_one_process_trains(
    command: Callable, tmp_path: Path, small_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config_text(small_config(str(tmp_path / "run"), data=small_data, steps=1)))
    assert command("train", "--config", path) == 0
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()


def test_several_processes_are_started_with_torchrun(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config_text(small_config(str(tmp_path / "run"), parallel={"tensor_parallel_size": 2})))
    assert command("train", "--config", path) == 2
    assert capsys.readouterr().err == (
        "error: the config needs 2 processes, but this is one: start "
        f"torchrun --nproc-per-node 2 -m megatron_step.train --config {path}\n"
    )


def test_a_bad_config_is_one_line(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "--config", "nowhere.yaml") == 2
    assert capsys.readouterr().err.startswith("error: cannot read the config nowhere.yaml")

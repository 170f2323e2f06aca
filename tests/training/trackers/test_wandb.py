"""Weights & Biases gets the shown steps of a run, under an id that no other run has."""

import re
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import wandb
from small_run import small_config

from megatron_step.config.run import LoggingConfig
from megatron_step.training.trackers.tracker import TrackedRun
from megatron_step.training.trackers.wandb import WeightsAndBiases, run_id


def test_wandb_gets_the_shown_steps_of_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = tmp_path / "lr=1e-3:seed=1"
    output.mkdir()
    config = replace(small_config(str(output)), logging=LoggingConfig(wandb="project"))
    tracker = WeightsAndBiases(TrackedRun(config, num_steps=10, first_step=0))
    for step in range(1, 5):
        tracker.write({"step": step, "grad_norm": 0.5}, step in (2, 4))
    tracker.close()
    (log,) = output.glob(f"wandb/offline-run-*-{run_id(output)}/*.wandb")
    deadline = monotonic() + 30  # wandb's own process writes, and does so a little later on a busy machine
    while log.read_bytes().count(b"grad_norm") < 2:
        assert monotonic() < deadline, "the shown steps were not logged"
        sleep(0.1)


def test_without_the_service_a_run_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service's refusal is made up: a real one takes its time. The run that follows is wandb's."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    init = wandb.init

    def init_without_service(**arguments: Any) -> Any:
        assert arguments["settings"].init_timeout == 15
        if arguments["mode"] is None:
            raise wandb.errors.CommError("Timed out while retrying: Post\nConsider increasing the init_timeout setting")
        return init(**arguments)

    monkeypatch.setattr(wandb, "init", init_without_service)
    config = replace(small_config(str(tmp_path)), logging=LoggingConfig(wandb="project"))
    tracker = WeightsAndBiases(TrackedRun(config, num_steps=10, first_step=0))
    tracker.write({"step": 1, "loss": 2.0}, True)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot be reached" in line]
    assert "(Timed out while retrying: Post): the run is logged offline" in line
    assert f"`wandb sync {tmp_path}/wandb/offline-run-*` sends it later" in line


def test_an_id_belongs_to_one_folder_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "a" / "main", tmp_path / "b" / "main", tmp_path / "b" / "main:1", tmp_path / "ø / ?"]
    ids = [run_id(folder) for folder in folders]
    assert len(set(ids)) == 4
    assert [run_id(folder) for folder in folders] == ids
    monkeypatch.chdir(tmp_path / "a")
    assert run_id(Path("main")) == run_id(Path("../a/main")) == ids[0]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) for text in ids)


def test_the_same_path_on_another_machine_is_another_run(tmp_path: Path) -> None:
    before = run_id(tmp_path / "out")
    for path in (tmp_path / "out" / "wandb").iterdir():
        path.unlink()
    assert run_id(tmp_path / "out") != before


def test_a_copied_folder_is_another_run(tmp_path: Path) -> None:
    before = run_id(tmp_path / "out")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "wandb").mkdir()
    for path in (tmp_path / "out" / "wandb").iterdir():
        (tmp_path / "copy" / "wandb" / path.name).write_bytes(path.read_bytes())
    assert run_id(tmp_path / "copy") != before

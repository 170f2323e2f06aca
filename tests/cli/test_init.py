"""`megatron-step init` writes files that a run starts from, and says what to do next."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_step.config.load import load_config


def test_a_config_for_gpus_comes_with_its_machines(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("init", "mine", "--size", "125m", "--machine", "8x80gb") == 0
    shown = capsys.readouterr().out
    assert "wrote mine/cluster.yaml, mine/config.yaml" in shown
    assert "torchrun --nproc-per-node 8 -m megatron_step.train --config config.yaml" in shown
    monkeypatch.chdir(tmp_path / "mine")
    assert command("plan", "--config", "config.yaml") == 0
    assert "proven" in capsys.readouterr().out


def test_a_config_for_a_laptop(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("init", tmp_path / "mine", "--steps", 30) == 0
    assert "megatron-step train --config config.yaml" in capsys.readouterr().out
    assert load_config(["--config", str(tmp_path / "mine/config.yaml")]).stages.steps == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "toaster"], "error: --machine toaster is not a valid machine: give cpu"),
        (["--size", "13b", "--machine", "1x8gb"], "choose a smaller --size or a larger --machine"),
        (["--steps", "0"], "error: --steps must be at least 1, not 0"),
        (["--size", "3.5t"], "invalid choice: '3.5t'"),
    ],
)
def test_bad_input_writes_nothing(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command("init", tmp_path / "mine", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_config_that_is_there_stays(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    assert command("init", tmp_path) == 2
    assert "config.yaml already exists: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "mine"

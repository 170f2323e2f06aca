"""The command's exit status and its one line for bad input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import small_config

from megatron_step import train
from megatron_step.checkpoint.save import SaveError
from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_text
from megatron_step.engine.parallel import stop_world
from megatron_step.training import run as run_module
from megatron_step.training.step import NonFiniteError


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(config_text(small_config(str(tmp_path / "run"))))
    arguments = ["train", "--config", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    return arguments


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.sede", "2"], "error: unknown option --training.sede; did you mean --training.seed?\n"),
        (["--model.num_attention_heads", "5"], "is not divisible by model.num_attention_heads 5"),
        (["--parallel.tensor_parallel_size", "3"], "is not divisible by parallel.tensor_parallel_size 3"),
        (["--data.tokenizer", "nowhere.model"], "nowhere.model"),
    ],
)
def test_bad_input_is_status_2_and_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str], overrides: list[str], message: str, tmp_path: Path
) -> None:
    command += overrides
    assert train.main() == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()
    stop_world()


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (True, 0),
        (False, 75),
        (NonFiniteError("the loss is nan"), 1),
        (SaveError("no room"), 1),
        (OSError("the disk is gone"), 1),
        (FileNotFoundError("no corpus"), 2),
        (ValueError("not so"), 2),
    ],
)
def test_the_status_says_how_the_run_ended(
    command: list[str], monkeypatch: pytest.MonkeyPatch, outcome: bool | Exception, status: int
) -> None:
    def run(config: object, stop: object) -> bool:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(run_module, "run", run)
    assert train.main() == status


def test_a_bad_config_is_answered_before_torch_is_imported(command: list[str]) -> None:
    program = (
        "import sys; from megatron_step import train; status = train.main(); assert 'torch' not in sys.modules; "
        "sys.exit(status)"
    )
    arguments = [sys.executable, "-c", program, *command[1:], "--model.num_layers", "0"]
    finished = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr == "error: model.num_layers must be at least 1, not 0\n"


def test_a_signal_before_training_is_status_75(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_data: DataConfig
) -> None:
    def plan(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run_module, "plan_and_forecast", plan)
    config = Path(command[2])
    config.write_text(config_text(small_config(str(config.parent / "run"), data=small_data)))
    assert train.main() == 75
    assert "stopped by SIGINT before training began: nothing was changed" in capsys.readouterr().err
    assert not (config.parent / "run").exists()
    stop_world()

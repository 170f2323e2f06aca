"""tools/evaluate.py prints the loss and the text of a checkpoint, and refuses what is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.engine.parallel import stop_world
from megatron_step.training.run import run


def test_loss_and_text(
    tool: Callable, tmp_path: Path, small_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small_config(str(tmp_path), data=small_data, steps=1))
    capsys.readouterr()
    assert tool("evaluate", tmp_path) == 0
    assert "step_00000001: validation loss 5." in capsys.readouterr().out
    assert tool("evaluate", tmp_path, "--generate", "Emma", "--tokens", "3") == 0
    assert capsys.readouterr().out.startswith("Emma")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: there is no checkpoint nowhere"),
        (["nowhere", "--tokens", "0"], "--tokens must be at least 1"),
    ],
)
def test_bad_input(tool: Callable, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert tool("evaluate", *arguments) == 2
    assert message in capsys.readouterr().err
    stop_world()

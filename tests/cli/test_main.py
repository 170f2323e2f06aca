"""One command with all that the package does."""

import re
from collections.abc import Callable
from importlib import import_module

import pytest

from megatron_step.cli.main import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(text)}$", shown, re.MULTILINE) for name, text in COMMANDS.items())
    assert main([]) == 2


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_each_command_has_its_help(name: str, command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(name, "--help") == 0
    assert f"usage: megatron-step {name}" in capsys.readouterr().out
    assert import_module(f"megatron_step.cli.{name.replace('-', '_')}").main.__doc__


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprt-hf"]) == 2
    said = capsys.readouterr().err
    assert said == "error: unknown command exprt-hf; did you mean export-hf? See megatron-step --help\n"


def test_a_stop_from_the_keyboard_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(arguments: list[str], prog: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_step.cli.report.main", stop)
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"

"""`python -m megatron_step` is the command, in any folder."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from megatron_step.cli.main import main


def test_the_module_is_the_command(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "megatron_step", "plan", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: megatron-step plan")


def test_the_installed_command_is_the_same() -> None:
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'megatron-step = "megatron_step.cli.main:main"' in declared
    for installed in entry_points(group="console_scripts", name="megatron-step"):
        assert installed.load() is main

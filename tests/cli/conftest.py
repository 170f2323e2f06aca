"""Runs a command inside the test's process."""

from collections.abc import Callable

import pytest

from megatron_step.cli.main import main


@pytest.fixture
def command() -> Callable[..., int]:
    """`command("report", *arguments)` is the exit status of `megatron-step report`."""

    def run(name: str, *arguments: object) -> int:
        try:
            return main([name, *map(str, arguments)])
        except SystemExit as stopped:
            return int(stopped.code or 0)

    return run

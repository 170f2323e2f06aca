"""Runs a command of tools/ inside the test's process."""

import importlib.util
import sys
from collections.abc import Callable

import pytest
from small_corpus import REPOSITORY


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`tool("report", *arguments)` is the exit status of tools/report.py."""

    def run(name: str, *arguments: object) -> int:
        specification = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / f"tools/{name}.py")
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            return module.main() or 0
        except SystemExit as stopped:
            return int(stopped.code or 0)

    return run

"""How far a reader walks who follows one size of the config through the calls that make a plan's table.

The reader goes from each place that reads or computes with the number to the next new one: back through the callers
that lead to both, and on from there. Each function is read once, at its first use of the number.
"""

import re
import sys
from collections.abc import Callable
from itertools import groupby, takewhile
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import megatron_step
from megatron_step.cli.plan import main
from megatron_step.config.model import ModelConfig

PACKAGE = str(Path(megatron_step.__file__).parent)
CONFIG = """
output_dir: unused
model: {num_layers: 8, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 4, seq_length: 32, vocab_size: 256}
data: {train: [[1.0, unused]], tokenizer: unused}
stages: {count: 2, steps: 10}
optimizer: {learning_rate: 1.0e-3}
training: {global_batch_size: 8, micro_batch_size: 2}
evaluation: {steps: 0}
"""
Place = tuple[str, str, int]
"""A file of the package, a function in it, and its line."""


class Followed(int):
    """An int that notes the calls which lead to each place that computes with it."""


def _calls(frame: FrameType | None) -> list[Place]:
    """The functions of the package on the stack of `frame`, outermost first."""
    calls: list[Place] = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            calls.insert(0, (code.co_filename[len(PACKAGE) + 1 :], code.co_name, code.co_firstlineno))
        frame = frame.f_back
    return calls


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[list[Place]]:
    """The calls that lead to each use of model.hidden_size: where it is read from the config, and computed with."""
    noted: list[list[Place]] = []

    def computes(operation: Callable[..., Any]) -> Callable[..., Any]:
        def followed(*numbers: Any) -> Any:
            noted.append(_calls(sys._getframe(1)))
            return operation(*numbers)

        return followed

    for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "truediv", "lt", "le", "gt", "ge"):
        monkeypatch.setattr(Followed, f"__{name}__", computes(getattr(int, f"__{name}__")), raising=False)
    check, read = ModelConfig.__post_init__, ModelConfig.__getattribute__

    def checked(model: ModelConfig) -> None:
        object.__setattr__(model, "hidden_size", Followed(model.hidden_size))
        check(model)

    def reads(model: ModelConfig, name: str) -> Any:
        if name == "hidden_size":
            noted.append(_calls(sys._getframe(1)))
        return read(model, name)

    monkeypatch.setattr(ModelConfig, "__post_init__", checked)
    monkeypatch.setattr(ModelConfig, "__getattribute__", reads)
    return noted


def _walk(uses: list[list[Place]]) -> list[str]:
    """The files of the walk, from the command that holds the config to the last function that uses the number."""
    files: list[str] = []
    read: set[Place] = set()
    here: list[Place] = []
    for calls in uses:
        is_loading = any(file == "config/load.py" for file, *_ in calls)
        if is_loading or calls[-1] in read:
            continue
        read.add(calls[-1])
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(here, calls))))
        files += [file for file, *_ in reversed(here[max(0, shared - 1) :])]
        files += [file for file, *_ in calls[shared:]]
        here = calls
    return [file for file, _ in groupby(files)]


def test_a_size_is_followed_from_the_config_to_the_table_in_few_steps(uses: list[list[Place]], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    walk = _walk(uses)
    page = (Path(__file__).parents[2] / "docs/architecture.md").read_text()
    assert walk == re.findall(r"^\d+\. `([\w/]+\.py)`", page, re.MULTILINE)
    assert len(walk) <= 20
    assert len(walk) - len(set(walk)) <= 8

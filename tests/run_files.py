"""Readers of a run's files, to compare runs."""

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from small_run import read_checkpoint

from megatron_step.checkpoint.directory import list_checkpoints

COMPUTED = ("step", "stage_index", "loss", "grad_norm", "learning_rate", "tokens", "validation_loss")
"""What a step computes, whatever the machine."""


def losses(output: Path) -> list[tuple[Any, ...]]:
    """All that a step computes, from metrics.jsonl, where floats have all their digits."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [tuple(line.get(name) for name in COMPUTED) for line in lines]


def last_step(output: Path) -> int:
    """The last step that the run's metrics tell of."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(output: Path, step: int, is_alive: Callable[[], bool] = lambda: True) -> None:
    """Return as soon as the run's metrics tell of `step`."""
    deadline = monotonic() + 300
    while last_step(output) < step:
        assert monotonic() < deadline, f"step {step} was not reached in time"
        assert is_alive(), f"the run ended before step {step}"
        sleep(0.005)


def assert_close_losses(ours: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]]) -> None:
    """Equal to rounding, which many steps amplify: in the gradient's norm a hundred times as much as in the loss."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        for name, value, expected in zip(COMPUTED, one, other):
            tolerance = 1e-3 if name == "grad_norm" else 1e-5
            assert value == expected or value == pytest.approx(expected, rel=tolerance), (name, one, other)


def assert_same_checkpoint(ours: Path, theirs: Path, same: Callable[[str, torch.Tensor, torch.Tensor], bool]) -> None:
    """The last checkpoints of two runs hold the same weights and optimizer states."""
    (step, one), (other_step, other) = (list_checkpoints(path / "checkpoints")[-1] for path in (ours, theirs))
    assert step == other_step
    tensors, expected = read_checkpoint(one), read_checkpoint(other)
    assert tensors.keys() == expected.keys()
    assert [key for key, tensor in tensors.items() if not same(key, tensor, expected[key])] == []


def equal(key: str, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(one, other)


def close(key: str, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to rounding; the second moments, of squared gradients, carry twice its relative error and more."""
    tolerance = 1e-3 if key.startswith("optimizer.state.exp_avg") else 1e-4
    return bool((one - other).norm() <= tolerance * other.norm())

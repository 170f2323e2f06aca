"""metrics.jsonl has every step once, also after a crash; shown lines say what matters."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.run import LoggingConfig, RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.training.logging import logging_hook
from megatron_step.training.memory import Memory
from megatron_step.training.stage import StepContext
from megatron_step.training.state import TrainState


def _config(output: Path, tensorboard: bool = False, interval: int = 5) -> RunConfig:
    return replace(small_config(str(output)), logging=LoggingConfig(interval=interval, tensorboard=tensorboard))


def _log(config: RunConfig, parallel: Parallel, first_step: int, last_step: int, **extra: float) -> None:
    state = TrainState(step=first_step, chunks=[], optimizer=None)  # type: ignore[arg-type]
    with logging_hook(config, VOCAB_SIZE, parallel, first_step) as hook:
        for step in range(first_step + 1, last_step + 1):
            metrics = {
                "step": step,
                "loss": 1 / step,
                "learning_rate": 1e-3,
                "grad_norm": 0.5,
                "tokens_per_second": 1e6,
                **extra,
            }
            memory = Memory(3 << 20, 5 << 20) if step == first_step + 2 else None
            hook(StepContext(state, metrics, memory, is_last=step == last_step))


def _lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_a_line_with_all_digits(alone: Parallel, tmp_path: Path) -> None:
    _log(_config(tmp_path), alone, 0, 7)
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[2]["loss"] == 1 / 3
    assert "mfu" not in lines[0], "no peak is known for a CPU"
    ranks = [{"model_state_bytes": 3 << 20, "activation_bytes": 5 << 20, "peak_bytes": 8 << 20}]
    assert lines[1]["memory"] == {**ranks[0], "ranks": ranks}
    assert [line["step"] for line in lines if "memory" in line] == [2, 5, 7]
    assert lines[4]["memory"] == ranks[0]


def test_steps_that_are_trained_again_are_dropped(alone: Parallel, tmp_path: Path) -> None:
    _log(_config(tmp_path), alone, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')  # cut off by a crash
    _log(_config(tmp_path), alone, 5, 8)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 9))


def test_shown_lines(alone: Parallel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _log(_config(tmp_path), alone, 0, 7)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in shown] == ["step 5/10", "step 7/10"]
    assert "loss 0.2000 | learning rate 1.00e-03 | gradient norm 0.500 | 1,000,000 tokens/s" in shown[0]
    assert "peak memory 8 MiB" in shown[0]


def test_an_evaluated_step_shows_its_perplexity(
    alone: Parallel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _log(_config(tmp_path, interval=1), alone, 0, 1, validation_loss=2.0, validation_perplexity=7.389)
    assert "validation loss 2.0000 | perplexity 7.39" in capsys.readouterr().out


def test_tensorboard_gets_the_shown_steps(alone: Parallel, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _log(_config(tmp_path, tensorboard=True), alone, 0, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [5, 7]
    assert events.Scalars("memory/peak_bytes")[0].value == 8 << 20


def test_wandb_gets_the_shown_steps(alone: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = replace(_config(tmp_path), logging=LoggingConfig(interval=5, tensorboard=False, wandb="project"))
    _log(config, alone, 0, 7)
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert log.read_bytes().count(b"grad_norm") >= 2

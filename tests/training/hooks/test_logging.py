"""Every step reaches every tracker, with speed and memory; no tracker ends training."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from small_run import VOCAB_SIZE, small_config
from worlds import Worlds

from megatron_step.config.run import LoggingConfig, RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.flops import stage_flops_per_token
from megatron_step.planner.costs.memory import RankMemory, stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.hooks.logging import logging_hook
from megatron_step.training.stage import StepContext
from megatron_step.training.state import TrainState
from megatron_step.training.trackers.tracker import MakeTracker, Metrics, TrackedRun


def _config(output: Path, tensorboard: bool = False, interval: int = 5) -> RunConfig:
    return replace(small_config(str(output)), logging=LoggingConfig(interval=interval, tensorboard=tensorboard))


MEMORY = RankMemory(
    frozen_weight_bytes=1 << 20,
    trained_weight_bytes=1 << 19,
    adapter_weight_bytes=1 << 18,
    gradient_bytes=1 << 18,
    optimizer_bytes=1 << 20,
    activation_bytes=5 << 20,
)
"""3 MiB of model states, 8 MiB at once."""


def _log(
    config: RunConfig,
    parallel: Parallel,
    first_step: int,
    last_step: int,
    stage_index: int = 0,
    growth_peak_bytes: int | None = None,
    measured: RankMemory = MEMORY,
    trackers: Sequence[MakeTracker] = (),
) -> None:
    plan = make_plan(resolve(config, VOCAB_SIZE))
    state = TrainState(first_step, plan.stages[stage_index], [], None, plan, growth_peak_bytes=growth_peak_bytes)
    with logging_hook(config, plan, VOCAB_SIZE, parallel, first_step, trackers) as hook:
        for step in range(first_step + 1, last_step + 1):
            metrics = {
                "step": step,
                "loss": 1 / step,
                "learning_rate": 1e-3,
                "grad_norm": 0.5,
                "tokens_per_second": 1e6,
            }
            memory = measured if step == first_step + 2 else None
            hook(StepContext(state, metrics, memory, is_last=step == last_step))


def _lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_a_line_with_all_digits(alone: Parallel, tmp_path: Path) -> None:
    _log(_config(tmp_path), alone, 0, 7)
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[2]["loss"] == 1 / 3
    assert "mfu" not in lines[0], "no peak is known for a CPU"


def test_memory_is_planned_and_measured_side_by_side(alone: Parallel, tmp_path: Path) -> None:
    config = _config(tmp_path)
    _log(config, alone, 0, 7)
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines if "memory" in line] == [2, 5, 7]
    ranks = lines[1]["memory"].pop("ranks")
    (planned,) = stage_memory(resolve(config, VOCAB_SIZE), make_plan(resolve(config, VOCAB_SIZE)).stages[0])
    totals = {"model_state_bytes": 3 << 20, "activation_bytes": 5 << 20, "peak_bytes": 8 << 20}
    assert lines[1]["memory"] == lines[4]["memory"] == {"planned_bytes": planned.peak_bytes, **totals}
    assert ranks == [{"pp_rank": 0, "planned": _kinds(planned), "measured": _kinds(MEMORY)}]
    assert ranks[0]["measured"]["frozen_weight_bytes"] == 1 << 20


def _kinds(memory: RankMemory) -> dict[str, int]:
    return {**asdict(memory), "model_state_bytes": memory.model_state_bytes, "peak_bytes": memory.peak_bytes}


def test_memory_of_every_rank_stands_beside_its_own_plan(worlds: Worlds, tmp_path: Path) -> None:
    worlds(2).run(log_two_pipeline_ranks, output=tmp_path)
    config = _two_pipeline_ranks(tmp_path)
    planned = stage_memory(resolve(config, VOCAB_SIZE), make_plan(resolve(config, VOCAB_SIZE)).stages[0])
    assert planned[0].peak_bytes != planned[1].peak_bytes
    memory = _lines(tmp_path)[1]["memory"]
    assert [rank["pp_rank"] for rank in memory["ranks"]] == [0, 1]
    assert [rank["planned"] for rank in memory["ranks"]] == [_kinds(rank) for rank in planned]
    assert [rank["measured"]["activation_bytes"] for rank in memory["ranks"]] == [5 << 20, 6 << 20]
    assert memory["planned_bytes"] == max(rank.peak_bytes for rank in planned)
    assert memory["peak_bytes"] == 9 << 20


def _two_pipeline_ranks(output: Path) -> RunConfig:
    return replace(
        small_config(str(output), parallel={"pipeline_parallel_size": 2}), logging=LoggingConfig(tensorboard=False)
    )


def log_two_pipeline_ranks(output: Path) -> None:
    """Log on two ranks; the second one has measured more than the first."""
    config = _two_pipeline_ranks(output)
    with parallel_layout(config.parallel, seed=1) as parallel:
        measured = replace(MEMORY, activation_bytes=(5 + parallel.pp_rank) << 20)
        _log(config, parallel, 0, 2, measured=measured)


def test_memory_of_the_growth_is_logged_in_its_stage(alone: Parallel, tmp_path: Path) -> None:
    config = replace(small_config(str(tmp_path), stages=GROWN), logging=LoggingConfig(tensorboard=False))
    _log(config, alone, 8, 11, stage_index=1, growth_peak_bytes=9 << 20)
    assert _lines(tmp_path)[1]["memory"]["growth_peak_bytes"] == 9 << 20


def test_speed_counts_the_operations_of_the_stage(alone: Parallel, tmp_path: Path) -> None:
    config = replace(small_config(str(tmp_path), stages=GROWN), logging=LoggingConfig(tensorboard=False))
    _log(config, alone, 8, 10, stage_index=1)
    flops = stage_flops_per_token(resolve(config, VOCAB_SIZE), make_plan(resolve(config, VOCAB_SIZE)).stages[1])
    assert _lines(tmp_path)[0]["tflops_per_second"] == 1e6 * flops / 1e12


GROWN = {"count": 2, "layers": [3, 1]}


def test_a_stage_does_not_show_the_memory_of_the_one_before(alone: Parallel, tmp_path: Path) -> None:
    config = replace(
        small_config(str(tmp_path), stages={"count": 2, "layers": [3, 1]}),
        logging=LoggingConfig(interval=1, tensorboard=False),
    )
    plan = make_plan(resolve(config, VOCAB_SIZE))
    metrics = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1e6}
    with logging_hook(config, plan, VOCAB_SIZE, alone, 0) as hook:
        for step, (stage, memory) in enumerate([(0, MEMORY), (0, None), (1, None), (1, MEMORY)], start=1):
            state = TrainState(step, plan.stages[stage], [], None, plan)
            hook(StepContext(state, {"step": step, **metrics}, memory, is_last=False))
    assert ["memory" in line for line in _lines(tmp_path)] == [True, True, False, True]


def test_shown_lines(alone: Parallel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _log(_config(tmp_path), alone, 0, 7)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(" | ")[0] for line in shown] == ["step 5/10", "step 7/10"]
    assert "loss 0.2000 | learning rate 1.00e-03 | gradient norm 0.500 | 1,000,000 tokens/s" in shown[0]
    assert "peak memory 8 MiB" in shown[0]


def test_every_tracker_of_the_config_gets_the_steps(
    alone: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = replace(_config(tmp_path), logging=LoggingConfig(interval=5, tensorboard=True, wandb="project"))
    _log(config, alone, 0, 7)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 8))
    assert list(tmp_path.glob("tensorboard/events.out.tfevents.*"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class _Raises:
    """A tracker of somebody else, with a fault."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    def write(self, metrics: Metrics, shown: bool) -> None:
        metrics.clear()
        raise RuntimeError("no route to host")

    def close(self) -> None:
        raise RuntimeError("not open")


def test_a_tracker_that_raises_does_not_end_training(
    alone: Parallel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _log(_config(tmp_path), alone, 0, 7, trackers=[_Raises])
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 8))
    assert capsys.readouterr().err.count("no route to host") == 1


def test_output_that_nothing_can_be_written_to_does_not_end_training(
    alone: Parallel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "tensorboard").write_text("a file in the folder's place")
    _log(_config(tmp_path, tensorboard=True), alone, 0, 7)
    said = capsys.readouterr()
    assert "step 7/10" in said.out
    assert said.err.count("cannot write") == 2

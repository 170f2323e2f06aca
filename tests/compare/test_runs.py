"""Runs train a few at a time, finished ones are not trained again, and a run that fails is named."""

from pathlib import Path
from typing import Any

import pytest
from small_run import small_config

from megatron_step.compare.arms import ArmRun
from megatron_step.compare.runs import RunError, train_all
from megatron_step.config.data import DataConfig


def _run(folder: Path, data: DataConfig, seed: int = 1, **sections: Any) -> ArmRun:
    config = small_config(str(folder / f"seed_{seed}"), steps=2, data=data, evaluation={"interval": 0}, **sections)
    return ArmRun("arm", 1e-3, seed, config)


def test_runs_are_trained_once(small_data: DataConfig, tmp_path: Path) -> None:
    runs = [_run(tmp_path, small_data, seed) for seed in (1, 2)]
    done: list[int] = []
    train_all(runs, 2, lambda run: done.append(run.seed))
    assert sorted(done) == [1, 2]
    logs = [run.folder / "output.log" for run in runs]
    lengths = [log.stat().st_size for log in logs]
    train_all(runs, 1, lambda run: done.append(run.seed))
    assert (sorted(done), [log.stat().st_size for log in logs]) == ([1, 1, 2, 2], lengths)


def test_a_run_that_fails_is_named_with_its_last_lines(small_data: DataConfig, tmp_path: Path) -> None:
    missing = DataConfig(train=[(1.0, str(tmp_path / "none"))], tokenizer=small_data.tokenizer, split=(90, 10))
    with pytest.raises(RunError, match=r"seed_1 failed:\n.*none"):
        train_all([_run(tmp_path, missing)], 1, lambda run: None)

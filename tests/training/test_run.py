"""A run trains from text to its last checkpoint, and refuses what cannot be before anything is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_from_text
from megatron_step.config.run import LoggingConfig, RunConfig
from megatron_step.engine.parallel import stop_world
from megatron_step.training.run import run


def _config(output: Path, data: DataConfig, **sections: Any) -> RunConfig:
    return small_config(str(output), data=data, **{"steps": 4, "checkpoint": {"interval": 2}, **sections})


def test_a_run_leaves_its_config_metrics_and_checkpoints(tmp_path: Path, small_data: DataConfig) -> None:
    config = _config(tmp_path, small_data, evaluation={"interval": 2, "steps": 2})
    assert run(config)
    assert config_from_text((tmp_path / "config.yaml").read_text()) == config
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["validation_loss" in line for line in lines] == [False, True, False, True]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


def test_a_finished_run_started_again_says_so_and_changes_nothing(
    tmp_path: Path, small_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, small_data, steps=2)
    assert run(config)
    metrics = (tmp_path / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert run(config)
    said = capsys.readouterr().out
    assert "step_00000002 is at the end of the run: nothing is left to train" in said
    assert "stage 1 of 1" not in said
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_a_fresh_start_over_checkpoints_is_refused(tmp_path: Path, small_data: DataConfig) -> None:
    assert run(_config(tmp_path, small_data, steps=2))
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match="holds the checkpoints of another run.*--resume auto, or choose another output_dir"
    ):
        run(_config(tmp_path, small_data, steps=2, checkpoint={"resume": "none"}))
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before
    stop_world()


def _missing_corpus(data: DataConfig) -> DataConfig:
    return replace(data, train=[(1.0, data.train[0][1] + "_of_another_name")])


def _missing_tokenizer(data: DataConfig) -> DataConfig:
    return replace(data, tokenizer="nowhere.model")


def _no_tokenizer(data: DataConfig) -> DataConfig:
    return replace(data, tokenizer=data.train[0][1] + ".json")


@pytest.mark.parametrize(
    ("change", "sections", "message"),
    [
        (_missing_corpus, {}, "corpus_of_another_name"),
        (_missing_tokenizer, {}, "nowhere.model"),
        (_no_tokenizer, {}, "corpus.json"),
        (lambda data: data, {"model": {"vocab_size": 100}}, "model.vocab_size 100 is smaller than the 400 tokens"),
        (lambda data: data, {"training": {"micro_batch_size": 3}}, "8 samples is not divisible"),
        (lambda data: data, {"parallel": {"tensor_parallel_size": 2}}, "a world of 1 rank does not fit"),
        (lambda data: data, {"model": {"seq_length": 50_000}}, "add text, lower model.seq_length"),
        (lambda data: data, {"checkpoint": {"resume": "nowhere"}}, "there is no checkpoint nowhere"),
        (lambda data: data, {"stages": {"start_from": "nowhere"}}, "nowhere"),
        (
            lambda data: data,
            {"stages": {"count": 2, "layers": [3, 1]}, "growth": {"operator": "stack", "init": "copy"}},
            "it cannot add 1 layer to 3",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    tmp_path: Path, small_data: DataConfig, change: Callable, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(_config(tmp_path / "run", change(small_data), **sections))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    stop_world()


def test_the_tokenizer_of_other_text_is_refused(tmp_path: Path, small_data: DataConfig) -> None:
    from megatron_step.data.train_tokenizer import train_tokenizer

    text = tmp_path / "other.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    other = tmp_path / "other.model"
    train_tokenizer([text], str(other), vocab_size=300)
    with pytest.raises(ValueError, match=r"other\.model"):
        run(_config(tmp_path / "run", replace(small_data, tokenizer=str(other))))
    assert not (tmp_path / "run").exists()
    stop_world()


def test_wandb_that_is_not_installed_is_missed_before_anything_is_written(
    tmp_path: Path, small_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_step.training.run.find_spec", lambda name: None)
    config = replace(_config(tmp_path / "run", small_data), logging=LoggingConfig(wandb="project"))
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        run(config)
    assert not (tmp_path / "run").exists()

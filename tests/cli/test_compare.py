"""`megatron-step compare` trains arms and shows them, again from its results, and refuses what it cannot compare."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from comparisons import BASE, RESULTS

from megatron_step.compare.results import write_results
from megatron_step.config.data import DataConfig

_KEYS = "--stages.layers [6,2] --stages.count 2 --stages.steps 4 --training.precision bf16_weights --evaluation.steps 1"


@pytest.fixture
def config(tmp_path: Path, small_data: DataConfig) -> Path:
    path = tmp_path / "base.yaml"
    data = {"train": [[1.0, small_data.train[0][1]]], "tokenizer": small_data.tokenizer, "split": [90, 10]}
    path.write_text(yaml.safe_dump({**BASE, "data": data}))
    return path


def test_arms_are_trained_with_each_rate_and_the_best_one_with_more_seeds(
    command: Callable[..., int], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        config,
        "--arms",
        "vanilla",
        "parity",
        "--rates",
        "1e-3",
        "3e-3",
        "--seeds",
        2,
        "--output",
        tmp_path / "o",
    ]
    assert command("compare", *arguments, *_KEYS.split()) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert len(results) == 6, "two rates with the first seed, the better one with the second, for each arm"
    assert sum(result["seed"] == 2 for result in results) == 2
    assert [line.split()[0] for line in shown.splitlines()[-3:-1]] == ["vanilla", "parity"]
    assert (tmp_path / "o/comparison.png").is_file()


def test_results_are_shown_again(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(RESULTS, tmp_path / "results.json")
    assert command("compare", tmp_path / "results.json", "--output", tmp_path) == 0
    assert "-1.00 ± 1.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "vanila"], "error: arm vanila is unknown"),
        (["--arms", "parity", "parity"], "names an arm twice"),
        (["--seeds", "0"], "error: --seeds and --jobs must be at least 1"),
        (["--training.sed", "2"], "unknown option --training.sed"),
        (["--training.precision", "fp32"], "error: arm parity: optimizer.states compact needs weights in 16 bits"),
    ],
)
def test_bad_input_trains_nothing(
    command: Callable[..., int],
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert command("compare", config, "--output", tmp_path / "o", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()

from pathlib import Path
from typing import Any

import pytest

from megatron_step.config.command_line import override, split_arguments
from megatron_step.config.run import RunConfig


def test_a_command_line_is_a_file_and_keys_with_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    arguments = ["--config=~/a.yaml", "--model.num_layers=2", "--optimizer.learning_rate", "-1", "--resume", "none"]
    path, pairs = split_arguments(arguments, RunConfig)
    assert path == Path("/home/me/a.yaml")
    assert pairs == [("model.num_layers", "2"), ("optimizer.learning_rate", "-1"), ("checkpoint.resume", "none")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config FILE is missing"),
        (["--config"], "the option --config lacks a value"),
        (["--config", "a", "--training.seed"], "the option --training.seed lacks a value"),
        (["--config", "a", "--training.seed", "--model.num_layers", "2"], "the option --training.seed lacks a value"),
        (["--config", "a", "b"], "unexpected argument b"),
        (["--config", "a", "--training.sed", "2"], "unknown option --training.sed; did you mean --training.seed?"),
        (["--config", "a", "--model.num_layers+", "2"], "unknown option --model.num_layers+"),
    ],
)
def test_a_bad_command_line_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        split_arguments(arguments, RunConfig)
    assert message in str(caught.value)


def test_an_override_sets_a_key_or_the_keys_of_a_section() -> None:
    values: dict[str, Any] = {"model": {"num_layers": 2, "rope_scaling": {"factor": 2}}, "training": {"ramp_up": None}}
    override(values, "model.num_layers", "3", RunConfig)
    override(values, "model", "{hidden_size: 8, rope_scaling: {high_freq_factor: 5}}", RunConfig)
    override(values, "training.ramp_up.start", "4", RunConfig)
    override(values, "logging.wandb", "name", RunConfig)
    assert values == {
        "model": {"num_layers": "3", "hidden_size": 8, "rope_scaling": {"factor": 2, "high_freq_factor": 5}},
        "training": {"ramp_up": {"start": "4"}},
        "logging": {"wandb": "name"},
    }
    override(values, "training.ramp_up", "null", RunConfig)
    override(values, "model", "null", RunConfig)
    assert values == {"training": {"ramp_up": None}, "logging": {"wandb": "name"}}


@pytest.mark.parametrize(
    "text", ["[1, 2]", "5", "nowhere.yaml", "{num_layers: 1, num_layers: 2}", "{a: ", "{wrong: 1}"]
)
def test_a_section_that_is_none_is_one_clear_line(text: str) -> None:
    with pytest.raises(ValueError, match="--model: "):
        override({}, "model", text, RunConfig)

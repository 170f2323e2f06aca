"""A config is read whole, overridden key by key, and refused with one line that says what to do."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_step.config.load import config_from_text, config_text, load_cluster, load_config
from megatron_step.config.run import RampUpConfig, RunConfig

_VALUES = {
    "output_dir": "runs/x",
    "model": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32},
    "data": {"train": [[1.0, "a"], [2, "b"]], "tokenizer": "t.model", "split": [99, 1]},
    "stages": {"steps": 10},
    "optimizer": {"learning_rate": "1e-3"},
    "training": {"global_batch_size": 8, "micro_batch_size": 2},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_VALUES))
    return path


def _load(path: Path, *overrides: str) -> RunConfig:
    return load_config(["--config", str(path), *overrides])


def test_a_file_becomes_a_config(path: Path) -> None:
    config = _load(path)
    assert config.model.num_layers == 4
    assert config.optimizer.learning_rate == 1e-3, "YAML takes 1e-3 for text"
    assert [tuple(pair) for pair in config.data.train] == [(1.0, "a"), (2.0, "b")]
    assert config.checkpoint.resume == "auto"


def test_the_command_line_overrides_the_file_in_both_spellings(path: Path) -> None:
    config = _load(
        path,
        "--model.num_layers=2",
        "--parallel.tensor_parallel_size",
        "2",
        "--data.train",
        "[[1.0, c]]",
        "--resume",
        "none",
        "--training.ramp_up",
        "{start: 4, increment: 2, samples: 100}",
    )
    assert (config.model.num_layers, config.parallel.tensor_parallel_size) == (2, 2)
    assert [tuple(pair) for pair in config.data.train] == [(1.0, "c")]
    assert config.checkpoint.resume == "none"
    assert config.training.ramp_up == RampUpConfig(4, 2, 100)
    assert load_config([f"--config={path}", "--resume=none"]).checkpoint.resume == "none"


def test_what_is_written_is_read_back(path: Path) -> None:
    config = _load(
        path, "--training.ramp_up", "{start: 4, increment: 2, samples: 100}", "--model.rope_scaling.factor", "8"
    )
    assert config_from_text(config_text(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.num_layer", "2"], "unknown option --model.num_layer; did you mean --model.num_layers?"),
        (["--trainnig.seed=2"], "did you mean --training.seed?"),
        (["--model.num_layers", "many"], "num_layers"),
        (["--training.precision", "fp8"], "fp8"),
        (["--model.hidden_size", "63"], "not divisible by model.num_attention_heads 4"),
        (["--stages.count", "5"], "stages.count 5 is more than model.num_layers 4"),
    ],
)
def test_a_bad_option_is_one_clear_line(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        _load(path, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layer: 2}", "unknown config key model.num_layer; did you mean model.num_layers?"),
        ("modle: {}", "unknown config key modle; did you mean model?"),
        ("training: {ramp_up: {begin: 1}}", "unknown config key training.ramp_up.begin"),
        ("model: [", "not valid YAML"),
        ("", "is not a config"),
        ("output_dir: x", "the config lacks model.num_layers"),
        ("output_dir: x\noutput_dir: y", "the key output_dir is given twice, in lines 1 and 2"),
        ("model:\n  num_layers: 1\n  num_layers: 2", "the key num_layers is given twice, in lines 2 and 3"),
        ("model: [1, 2]", "model is [1, 2]: it must be a section"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        _load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.seed", None, "training.seed is empty (null): give it a value, or leave the key out for its default"),
        ("training.seed", "x", "training.seed is x: it must be a whole number"),
        ("training.seed", -1, "training.seed must lie in [0, 2^32), not -1"),
        ("data.split", [1, 2, 3], "data.split is [1, 2, 3]: it must be a list of a number and a number or null"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate must be a finite number, not inf"),
        ("output_dir", 5, "output_dir is 5: it must be text"),
        ("output_dir", "a\0b", "a character that no file name can hold"),
        ("data.tokenizer", "~nobody_of_this_name/t", "home folder of user nobody_of_this_name"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_is_due(path: Path, key: str, value: object, message: str) -> None:
    values = copy.deepcopy(_VALUES)
    section: Any = values
    *sections, name = key.split(".")
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError) as caught:
        _load(path)
    assert message in str(caught.value)


def test_a_section_without_keys_has_its_defaults(path: Path) -> None:
    text = path.read_text()
    path.write_text(text + "schedule:\n#  warmup_steps: 10\nlogging:\nadapter: {}\n")
    assert _load(path) == _load_text(path, text)


def test_numbers_may_stand_in_quotes(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace("num_layers: 4", "num_layers: '4'").replace("- 99", "- '99'"))
    assert _load(path) == _load_text(path, text)


@pytest.mark.parametrize("how", ["file", "option"])
def test_home_is_expanded_in_every_path(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = {
        "output_dir": "~/run",
        "data.train": [[1.0, "~/train"]],
        "data.tokenizer": "$HOME/t.model",
        "data.split": None,
        "data.validation": [[1.0, "${HOME}/validation"]],
        "data.cache_dir": "~/cache",
        "stages.start_from": "~/start",
        "planner.cluster": "~/cluster.yaml",
        "planner.plan": "~/plan.json",
        "checkpoint.resume": "~/checkpoint",
    }
    options = [part for name, value in keys.items() for part in (f"--{name}", json.dumps(value).strip('"'))]
    if how == "file":
        values = copy.deepcopy(_VALUES)
        for name, value in keys.items():
            section, _, key = name.rpartition(".")
            (values.setdefault(section, {}) if section else values)[key] = value  # type: ignore[index]
        path.write_text(yaml.safe_dump(values))
        options = []
    config = _load(path, *options)
    assert "~" not in config_text(config)
    assert "$" not in config_text(config)
    assert (config.output_dir, config.checkpoint.resume) == ("/home/me/run", "/home/me/checkpoint")
    assert config.data.train == [(1.0, "/home/me/train")]


def test_a_cluster_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    group = "{count: 1, gpus_per_node: 8, memory_gib: 80}"
    path.write_text(f"nodes: [{group}]\n")
    assert load_cluster(path).num_gpus == 8
    for text, message in [
        (f"nodes: [{group}]\nnodes: [{group}]\n", "the key nodes is given twice, in lines 1 and 2"),
        (f"nodes: [{group[:-1]}, count: 2}}]\n", "the key count is given twice, in lines 1 and 1"),
        ("nodes:\n", "nodes must be a list of groups"),
        (f"nodes: [{group}]\nteraflops:\n", "teraflops is empty"),
        ("nodes: [{count: 1}]\n", "lacks nodes.gpus_per_node, nodes.memory_gib"),
        (f"nodes: [{group.replace('80', 'x')}]\n", "memory_gib"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match="cluster.yaml") as caught:
            load_cluster(path)
        assert message in str(caught.value)


def _load_text(path: Path, text: str) -> RunConfig:
    path.write_text(text)
    return _load(path)


def test_a_missing_file_and_a_missing_option_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the config .*nowhere.yaml: No such file"):
        _load(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="--config FILE is missing"):
        load_config(["--training.seed", "1"])


def test_help_names_every_key_and_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--parallel.tensor_parallel_size" in shown
    assert "Samples that a rank processes at once." in shown

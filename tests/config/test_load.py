"""A config is read whole, overridden key by key, and refused with one line that says what to do."""

from pathlib import Path

import pytest
import yaml

from megatron_step.config.load import config_from_text, config_text, load_config
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
        ("output_dir: x", "model"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        _load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
    assert "Samples that a rank holds in memory at once." in shown

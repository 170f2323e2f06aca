"""The config sections on growth check their values, and YAML gives the same values as Python."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_step.config.load import config_from_text, config_text, load_config
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import AdapterConfig, FreezeConfig, StagesConfig

_VALUES: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"num_layers": 12, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32},
    "data": {"train": [[1.0, "a"]], "tokenizer": "t.model", "split": [99, 1]},
    "stages": {"count": 3, "layers": "auto", "steps": 1000, "grow_at": 0.75},
    "growth": {"operator": "interpolate", "position": "upper", "init": "mean"},
    "freeze": {"norms": True},
    "adapter": {"rank": 16, "alpha": 32, "targets": ["qkv", "fc2"], "restart_interval": 100},
    "optimizer": {"learning_rate": "1e-3", "new_layers_scale": 2.0},
    "schedule": {"warmup_steps": 100, "rewarm_steps": 50},
    "training": {"global_batch_size": 8, "micro_batch_size": 2},
}


def _load(tmp_path: Path, *overrides: str, **sections: Any) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**_VALUES, **sections}))
    return load_config(["--config", str(path), *overrides])


def test_a_staged_run_is_read_and_written_back(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert config.stages.layers == "auto"
    assert config.freeze == FreezeConfig(norms=True)
    assert config.adapter.targets == ["qkv", "fc2"]
    assert config.adapter.scaling == 2.0
    assert config_from_text(config_text(config)) == config


def test_lists_name_each_stage(tmp_path: Path) -> None:
    stages = {"count": 3, "layers": [5, 4, 3], "steps": [10, 20, 30], "learning_rates": [1e-3, 5e-4, 5e-4]}
    config = _load(tmp_path, stages=stages)
    assert config.stages.layers == [5, 4, 3]
    assert config.stages.steps == [10, 20, 30]
    assert config_from_text(config_text(config)) == config
    assert _load(tmp_path, "--stages.layers", "[6, 4, 2]").stages.layers == [6, 4, 2]
    assert _load(tmp_path, "--stages.layers", "auto", stages=stages).stages.layers == "auto"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--stages.layer", "did you mean --stages.layers?"),
        ("--adapter.ranks", "did you mean --adapter.rank?"),
        ("--growth.positon", "did you mean --growth.position?"),
        ("--freeze.norm", "did you mean --freeze.norms?"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        _load(tmp_path, option, "1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StagesConfig(steps=0), "stages.steps must be at least 1, not 0"),
        (lambda: StagesConfig(steps=1, count=0), "stages.count must be at least 1"),
        (lambda: StagesConfig(), "neither stages.steps nor stages.tokens is set"),
        (lambda: StagesConfig(steps=1, tokens=1), "stages.steps and stages.tokens are both set"),
        (lambda: StagesConfig(steps=[1, 2]), "stages.steps has 2 entries, but stages.count is 1"),
        (lambda: StagesConfig(steps=[1, 0], count=2), "stages.steps must be at least 1, not 0"),
        (lambda: StagesConfig(steps=[0, 5], count=2), "stages.steps must be at least 1, not 0"),
        (lambda: StagesConfig(steps=[0, 0], count=2, start_from="x"), "stages.steps must be at least 1, not 0"),
        (lambda: StagesConfig(steps=[0], start_from="x"), "stages.steps must be at least 1, not 0"),
        (lambda: StagesConfig(steps=0, count=2, start_from="x"), "stages.steps must be at least 1, not 0"),
        (lambda: StagesConfig(tokens=-5), "stages.tokens must be at least 1, not -5"),
        (
            lambda: StagesConfig(steps=5, count=3, grow_at=[0.5, 0.5, 0.5]),
            r"grow_at has 3 entries, but .* grows 2 times",
        ),
        (lambda: StagesConfig(steps=5, count=3, grow_at=[0.5, 1.5]), r"stages.grow_at must lie in \(0, 1\], not \[0.5"),
        (lambda: StagesConfig(steps=5, count=2, shares=[0.5]), "stages.shares has 1 entry, but stages.count is 2"),
        (
            lambda: StagesConfig(steps=5, count=2, shares=[0.5, 0.4]),
            r"\[0.5, 0.4\] add up to 0.9: make them add up to 1",
        ),
        (lambda: StagesConfig(steps=5, count=2, shares=[0.0, 1.0]), "stages.shares must be positive"),
        (lambda: StagesConfig(steps=5, count=2, start_from="x", shares=[1.0, 0.0]), "stages.shares must be positive"),
        (lambda: StagesConfig(steps=[5, 5], count=2, shares=[0.5, 0.5]), "stages.steps is a list for its stages"),
        (
            lambda: StagesConfig(tokens=5, count=2, grow_at=0.5, shares=[0.5, 0.5]),
            "stages.shares and stages.grow_at both say when the model grows: leave one of the two keys out",
        ),
        (lambda: StagesConfig(steps=5, count=2, grow_at=0.0), r"stages.grow_at must lie in \(0, 1\], not 0.0"),
        (lambda: StagesConfig(steps=5, count=2, grow_at=1.5), "not 1.5"),
        (lambda: StagesConfig(steps=5, count=2, layers=[5]), "stages.layers has 1 entry, but stages.count is 2"),
        (lambda: StagesConfig(steps=5, count=2, layers=[0, 5]), "the first entry must be at least 1"),
        (lambda: StagesConfig(steps=5, count=2, layers=[5, -1]), "and the others at least 0"),
        (lambda: StagesConfig(steps=5, learning_rates=[1.0, 2.0]), "stages.learning_rates has 2 entries"),
        (lambda: StagesConfig(steps=5, learning_rates=[0.0]), "must be positive"),
        (lambda: StagesConfig(steps=5, layouts=[[1], [2]]), "stages.layouts has 2 entries"),
        (lambda: AdapterConfig(rank=-1), "adapter.rank must be at least 0"),
        (lambda: AdapterConfig(alpha=0.0), "adapter.alpha must be positive"),
        (lambda: AdapterConfig(targets=[]), "name at least one linear, each once"),
        (lambda: AdapterConfig(targets=["qkv", "qkv"]), "name at least one linear, each once"),
        (lambda: AdapterConfig(dropout=1.0), r"adapter.dropout must lie in \[0, 1\)"),
        (lambda: AdapterConfig(restart_interval=-1), "adapter.restart_interval must be at least 0"),
        (lambda: AdapterConfig(restart_prune=1.1), r"adapter.restart_prune must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_first_stage_of_no_steps_needs_a_start_checkpoint() -> None:
    assert StagesConfig(steps=[0, 5], count=2, start_from="runs/x/checkpoints/step_00000010").steps == [0, 5]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"stages": {"count": 2, "layers": [5, 4], "steps": 1}}, r"\[5, 4\] add up to 9 layers, but .* is 12"),
        ({"stages": {"count": 13, "steps": 1}}, "stages.count 13 is more than model.num_layers 12"),
        ({"adapter": {"rank": 3}, "parallel": {"tensor_parallel_size": 2}}, "adapter.rank 3 is not divisible"),
        ({"growth": {"position": "top"}}, "growth"),
        ({"adapter": {"targets": ["mlp"]}}, "adapter"),
    ],
)
def test_sections_that_do_not_fit_are_one_clear_line(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _load(tmp_path, **sections)
    assert "\n" not in str(caught.value)


def test_the_policy_for_old_layers_follows_older_keys_unless_it_is_named(tmp_path: Path) -> None:
    assert _load(tmp_path).old_layer_policy == "adapters"
    assert _load(tmp_path, adapter={"rank": 0}).old_layer_policy == "frozen"
    assert _load(tmp_path, freeze={"layers": False}).old_layer_policy == "trained"
    assert _load(tmp_path, old_layers={"policy": "frozen"}).old_layer_policy == "frozen"

"""A preset sets keys; a key that the config gives itself replaces the preset's."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from megatron_step.config.load import config_from_text, config_from_values, config_text, load_config
from megatron_step.config.presets import Preset, preset_line
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import GrowthConfig

_VALUES: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"num_layers": 12, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32},
    "data": {"train": [[1.0, "a"]], "tokenizer": "t.model", "split": [99, 1]},
    "stages": {"steps": 1000},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"global_batch_size": 8, "micro_batch_size": 2},
}


def _config(**sections: Any) -> RunConfig:
    return config_from_values({**_VALUES, **sections})


def test_parity_trains_every_layer_with_compact_states_and_one_schedule() -> None:
    config = _config(preset="parity")
    assert config.old_layer_policy == "trained"
    assert (config.optimizer.states, config.optimizer.learning_rate) == ("compact", 1e-3)
    assert (config.schedule.scope, config.schedule.decay_fraction) == ("run", 0.4)
    assert config.stages.run_shares == pytest.approx([0.3, 0.3, 0.4])


def test_lean_trains_half_of_the_old_layers_at_a_time() -> None:
    config = _config(preset="lean")
    assert (config.old_layer_policy, config.old_layers.active_share) == ("rotate", 0.5)
    assert (config.optimizer.states, config.schedule.scope) == ("smallest", "run")


def test_paper_is_step_as_published() -> None:
    config = _config(preset="paper")
    assert config.old_layer_policy == "adapters"
    assert (config.stages.count, config.stages.grow_at, config.schedule.scope) == (3, 0.75, "stage")


@pytest.mark.parametrize("preset", get_args(Preset))
def test_every_key_stays_open(preset: Preset) -> None:
    config = _config(
        preset=preset,
        stages={"steps": 10, "count": 2, "shares": [0.5, 0.5]},
        schedule={"kind": "cosine"},
        optimizer={"learning_rate": 1e-3, "states": "exact"},
    )
    assert (config.stages.count, config.stages.run_shares) == (2, [0.5, 0.5])
    assert (config.schedule.kind, config.optimizer.states) == ("cosine", "exact")
    assert config.schedule.scope == _config(preset=preset).schedule.scope, "other keys of a section stay the preset's"


@pytest.mark.parametrize("stages", [{"steps": 10, "grow_at": 0.5}, {"steps": [5, 5, 10]}, {"tokens": [500, 500, 900]}])
def test_another_way_to_say_when_the_model_grows_replaces_the_shares(stages: dict[str, Any]) -> None:
    assert _config(preset="parity", stages=stages).stages.shares is None


def test_ordinary_training_from_a_preset() -> None:
    config = _config(preset="parity", stages={"steps": 10, "count": 1})
    assert config.stages.run_shares == [1.0]


@pytest.mark.parametrize("preset", get_args(Preset))
def test_it_is_the_same_from_python_from_a_file_and_from_the_command_line(tmp_path: Path, preset: Preset) -> None:
    from_values = _config(preset=preset)
    assert RunConfig(**{**_VALUES, "data": from_values.data}, preset=preset) == from_values
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**_VALUES, "preset": preset}))
    assert load_config(["--config", str(path)]) == from_values
    path.write_text(yaml.safe_dump(_VALUES))
    assert load_config(["--config", str(path), "--preset", preset]) == from_values
    assert config_from_text(config_text(from_values)) == from_values


def test_a_section_given_as_an_object_is_taken_as_it_is() -> None:
    values = {**_VALUES, "data": _config().data, "growth": GrowthConfig()}
    assert RunConfig(**values, preset="parity").growth == GrowthConfig()


def test_a_default_that_the_config_gives_is_kept() -> None:
    assert _config(preset="parity", schedule={"scope": "stage"}).schedule.scope == "stage"
    written = config_text(_config(preset="parity", schedule={"scope": "stage"}))
    assert config_from_text(written).schedule.scope == "stage"


@pytest.mark.parametrize("preset", ["partiy", [1], {"a": 1}, 5])
def test_an_unknown_preset_is_refused(preset: Any) -> None:
    with pytest.raises(ValueError, match=r"preset .* is unknown: choose one of parity, lean, paper"):
        _config(preset=preset)


def test_the_line_shows_every_key_and_what_the_config_replaces() -> None:
    line = preset_line("parity", _config(preset="parity", stages={"steps": 10, "count": 2}))
    assert line.startswith(
        "preset parity: stages.count 2 (the preset: 3), stages.shares auto, growth.operator interpolate"
    )
    assert line.endswith("schedule.scope run, schedule.kind wsd, schedule.decay_fraction 0.4")

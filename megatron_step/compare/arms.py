"""The arms of a comparison: ways of training the same model on the same tokens in the same order.

An arm is a set of config keys, which replace those of the comparison's config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_step.config.load import config_from_values, read_config_file
from megatron_step.config.run import RunConfig
from megatron_step.config.sections import merged

_ORDINARY = {"preset": "parity", "stages": {"count": 1, "layers": "auto"}}  # the preset's schedule, without growth

ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {**_ORDINARY, "optimizer": {"states": "full"}},
    "vanilla_muon": {**_ORDINARY, "optimizer": {"states": "full", "rule": "muon"}},
    "parity": {"preset": "parity"},
    "parity_muon": {"preset": "parity", "optimizer": {"rule": "muon"}},
    "lean": {"preset": "lean"},
    "paper": {"preset": "paper", "stages": {"shares": "auto"}},
    "growth": {"preset": "parity", "optimizer": {"states": "full"}},
    "frozen": {"preset": "parity", "old_layers": {"policy": "frozen"}},
    "adapters": {"preset": "parity", "old_layers": {"policy": "adapters"}},
    "g_stack": {
        "preset": "parity",
        "stages": {"count": 2, "layers": "auto"},
        "growth": {"operator": "stack", "init": "copy"},
    },
}
"""Keys of each arm, by section. `vanilla` is ordinary training, `growth` growth alone with full states."""


@dataclass(frozen=True)
class ArmRun:
    """A run of an arm."""

    arm: str
    """Name of the arm."""
    learning_rate: float
    """Peak learning rate."""
    seed: int
    """Seed of the initial weights and of the order of the data."""
    config: RunConfig
    """The run's config."""

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.config.output_dir)


def arm_values(name: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values `base` of the comparison's config with the keys of an arm, which may be a YAML file of keys.

    Raises ValueError if there is no such arm, or if its file cannot be read.
    """
    if name.endswith((".yaml", ".yml")):
        return merged(base, read_config_file(Path(name)))
    if name not in ARMS:
        raise ValueError(f"arm {name} is unknown: choose from {', '.join(ARMS)}, or name a YAML file of config keys")
    return merged(base, ARMS[name])


def arm_name(name: str) -> str:
    """Return the name of an arm, which for a YAML file is the file's without its ending."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name


def arm_config(name: str, base: Mapping[str, Any], output: Path) -> RunConfig:
    """Return the config of an arm; `base` has the values of the comparison's config, with its learning rate and seed.

    Raises ValueError if the config is not valid with the arm's keys, or evaluates nothing.
    """
    values = arm_values(name, base)
    try:
        config = config_from_values({**values, "output_dir": str(output / arm_name(name))})
    except ValueError as error:
        raise ValueError(f"arm {name}: {error}") from None
    if not config.data.has_validation or config.evaluation.steps == 0:
        raise ValueError("a comparison needs validation text: set data.validation or data.split, and evaluation.steps")
    return config


def arm_run(config: RunConfig, name: str, learning_rate: float, seed: int) -> ArmRun:
    """Return the run of an arm's `config` with a learning rate and a seed, in its own folder."""
    folder = Path(config.output_dir) / f"rate_{learning_rate:g}" / f"seed_{seed}"
    changed = replace(
        config,
        output_dir=str(folder),
        optimizer=replace(config.optimizer, learning_rate=learning_rate),
        training=replace(config.training, seed=seed),
        data=replace(config.data, seed=seed),
    )
    return ArmRun(arm_name(name), learning_rate, seed, changed)


def check_comparable(configs: Sequence[RunConfig]) -> None:
    """Raise ValueError, naming the key, if arms would train other models, or on other tokens."""
    first = asdict(configs[0])
    for config in configs[1:]:
        values = asdict(config)
        keys = [(section, key) for section in ("model", "data") for key in first[section]]
        keys += [("training", "global_batch_size"), ("training", "ramp_up"), ("stages", "steps"), ("stages", "tokens")]
        for section, key in keys:
            if values[section][key] != first[section][key]:
                raise ValueError(
                    f"the arms differ in {section}.{key}, {first[section][key]} and {values[section][key]}: a "
                    "comparison needs the same model and tokens. For stages of different lengths, use stages.shares"
                )

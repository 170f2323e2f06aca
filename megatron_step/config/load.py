"""Load a run's config from a YAML file and from keys on the command line."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.config.command_line import USAGE, override, split_arguments
from megatron_step.config.plugins import import_plugins
from megatron_step.config.presets import with_preset
from megatron_step.config.run import RunConfig
from megatron_step.config.sections import check_complete, expectation, in_short, read_sections
from megatron_step.config.yaml_json import parse_yaml, read_yaml

_DESCRIPTION = "Train a language model. Any key of the config file can be overridden, as in --training.seed 2."
_Section = TypeVar("_Section", RunConfig, Cluster)


def load_config(arguments: Sequence[str]) -> RunConfig:
    """Load the config that command-line arguments such as `--config FILE --training.seed 2` describe.

    `--help` prints the keys and exits.

    Raises ValueError, with one line that says what is wrong and what to do.
    """
    if "--help" in arguments or "-h" in arguments:
        _parser(RunConfig).print_help()
        raise SystemExit(0)
    path, overrides = split_arguments(arguments, RunConfig)
    values = read_config_file(path)
    for name, text in overrides:
        override(values, name, text, RunConfig)
    return config_from_values(values)


def config_from_values(values: dict[str, Any]) -> RunConfig:
    """Make a config from values by key (a section is a dict), and import the config's plugins.

    Raises ValueError if a key is unknown, a value is not valid or a plugin cannot be imported.
    """
    config = _instantiate(with_preset(read_sections(values, RunConfig)), RunConfig)
    import_plugins(config.plugins)
    return config


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the values of a config file by key; a section is a dict.

    Raises ValueError if the file cannot be read or has an unknown key.
    """
    return read_sections(_read(path, "config", "model, data and training"), RunConfig)


def config_text(config: RunConfig) -> str:
    """Return every key of `config` as YAML."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, width=120)


def config_from_text(text: str) -> RunConfig:
    """Make the config whose YAML `config_text` returned.

    Raises ValueError if a key is unknown or a value is not valid.
    """
    return _instantiate(with_preset(read_sections(parse_yaml(text), RunConfig)), RunConfig)


def load_cluster(path: Path) -> Cluster:
    """Load a cluster from a YAML file.

    Raises ValueError, with one line that says what is wrong and what to do.
    """
    values = _read(path, "cluster", "nodes")
    groups = values.get("nodes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(
            f"{path}: nodes must be a list of groups, as in [{{count: 2, gpus_per_node: 8, memory_gib: 72}}]"
        )
    try:
        read_sections(values, Cluster)
        for group in groups:
            check_complete(read_sections(group, NodeGroup, "nodes."), NodeGroup, "nodes.")
        return _instantiate(values, Cluster)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path, kind: str, sections: str) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ValueError(f"cannot read the {kind} {path}: {error.strerror}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a {kind}: it must hold sections such as {sections}")
    return values


@lru_cache
def _parser(cls: type) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, usage=USAGE, description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file with the run's config.")
    parser.add_class_arguments(cls)
    return parser


def _instantiate(values: dict[str, Any], cls: type[_Section]) -> _Section:
    """Make a section from its values by key.

    Raises ValueError if a key is missing, or has a value of the wrong type.
    """
    check_complete(values, cls)
    parser = _parser(cls)  # type: ignore[arg-type]  # lru_cache hashes the class, not its instances
    try:
        made = parser.instantiate(parser.parse_object(values, defaults=False)).as_dict()
    except ArgumentError as error:
        raise ValueError(_explain(error, values, cls)) from None
    return cls(**made)


def _explain(error: ArgumentError, values: dict[str, Any], cls: type) -> str:
    """Say what is wrong with a value in the config's words; jsonargparse names Python's types."""
    message = " ".join(str(error).split())
    key = re.match(r'Parser key "([\w.]+)"', message)
    if key is None or (cls is Cluster and key[1] == "nodes"):
        return message
    value: Any = values
    for name in key[1].split("."):
        value = value[name]
    return f"{key[1]} is {in_short(value)}: it must be {expectation(cls, key[1])}"


def _plain(value: Any) -> Any:
    """Return `value` with tuples as lists: YAML has no plain form for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""Reads a run's config: a YAML file, with any key overridden on the command line."""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_step.config.cluster import Cluster, NodeGroup
from megatron_step.config.run import RunConfig

_USAGE = (
    "torchrun --nproc-per-node N -m megatron_step.train --config FILE [--resume auto|none|PATH] "
    "[--section.key VALUE ...]"
)
_DESCRIPTION = "Train a language model. Any key of the config file can be overridden, as in --training.seed 2."


def load_config(arguments: Sequence[str]) -> RunConfig:
    """The config that command-line arguments such as `--config FILE --training.seed 2` describe.

    Raises ValueError with one line that says what is wrong and what to do; `--help` prints the keys and exits.
    """
    parser = _parser()
    if "--help" in arguments or "-h" in arguments:
        parser.print_help()
        raise SystemExit(0)
    path, overrides = _split_arguments(arguments)
    _check_option_names(overrides)
    values = _read_yaml(path, "config", "model, data and training")
    _check_keys(values, RunConfig, "")
    return _instantiate(parser, lambda: parser.parse_args(["--config", str(path), *overrides]))


def config_text(config: RunConfig) -> str:
    """Every key of `config` as YAML."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, width=120)


def config_from_text(text: str) -> RunConfig:
    """The config that `config_text` wrote.

    Raises ValueError if a key is unknown or a value is not valid.
    """
    values = yaml.safe_load(text)
    _check_keys(values, RunConfig, "")
    parser = _parser()
    return _instantiate(parser, lambda: parser.parse_object(values))


def load_cluster(path: Path) -> Cluster:
    """The cluster that a YAML file describes.

    Raises ValueError with one line that says what is wrong and what to do.
    """
    values = _read_yaml(path, "cluster", "nodes")
    _check_keys(values, Cluster, "")
    groups = values.get("nodes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(
            f"{path}: nodes must be a list of groups, as in [{{count: 2, gpus_per_node: 8, memory_gib: 72}}]"
        )
    for group in groups:
        _check_keys(group, NodeGroup, "nodes.")
        missing = [name for name in ("count", "gpus_per_node", "memory_gib") if name not in group]
        if missing:
            raise ValueError(f"{path}: a group of nodes lacks {', '.join(missing)}: {group}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Cluster)
    try:
        return Cluster(**parser.instantiate(parser.parse_object(values)).as_dict())
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None


def _read_yaml(path: Path, kind: str, sections: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the {kind} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a {kind}: it must hold sections such as {sections}")
    return values


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, usage=_USAGE, description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file with the run's config.")
    parser.add_class_arguments(RunConfig)
    return parser


def _instantiate(parser: ArgumentParser, parse: typing.Callable[[], Any]) -> RunConfig:
    try:
        values = parser.instantiate(parse()).as_dict()
    except ArgumentError as error:
        raise ValueError(_one_line(error)) from None
    values.pop("config", None)
    return RunConfig(**values)


def _split_arguments(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The config file, and the other arguments with `--resume` spelt out."""
    path = None
    overrides = []
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else next(pending, None)
        elif name == "--resume":
            overrides.append("--checkpoint.resume" + equals + value)
        else:
            overrides.append(argument)
    if not path:
        raise ValueError(f"--config FILE is missing; usage: {_USAGE}")
    return Path(path), overrides


def _check_option_names(overrides: Sequence[str]) -> None:
    known = list(_dotted_names(RunConfig, ""))
    for argument in overrides:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            if name not in known:
                raise ValueError(f"unknown option --{name}{_suggestion(name, known, '--')}")


def _dotted_names(cls: type, prefix: str) -> Iterator[str]:
    for name, kind in _field_types(cls).items():
        yield prefix + name
        if is_dataclass(kind):
            yield from _dotted_names(kind, f"{prefix}{name}.")


def _check_keys(values: dict[str, Any], cls: type, prefix: str) -> None:
    """Raise ValueError if `values` has a key that is not a field of `cls`, at any depth."""
    kinds = _field_types(cls)
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"unknown config key {prefix}{key}{_suggestion(str(key), list(kinds), prefix)}")
        kind = kinds[key]
        if is_dataclass(kind) and isinstance(value, dict):
            _check_keys(value, kind, f"{prefix}{key}.")


def _field_types(cls: type) -> dict[str, type]:
    """Field names and types; of `X | None`, X."""
    hints = typing.get_type_hints(cls)
    return {field.name: _without_none(hints[field.name]) for field in fields(cls)}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _suggestion(name: str, known: list[str], prefix: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


def _plain(value: Any) -> Any:
    """`value` with tuples as lists, which YAML has a plain form for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

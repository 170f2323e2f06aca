"""The command line of a run: its config file, and the keys that override the file's."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from megatron_step.config.paths import path_argument
from megatron_step.config.sections import dotted_names, in_short, merged, read_sections, section_keys, suggestion
from megatron_step.config.yaml_json import parse_yaml

USAGE = (
    "torchrun --nproc-per-node N -m megatron_step.train --config FILE [--resume auto|none|PATH] "
    "[--section.key VALUE ...]"
)


def split_arguments(arguments: Sequence[str], cls: type) -> tuple[Path, list[tuple[str, str]]]:
    """Return the config file, and pairs of a key's dotted name and its text; `--resume` becomes `checkpoint.resume`.

    Raises ValueError if the file is not named, if an option is unknown, or if an option lacks its value.
    """
    path, pairs = None, []
    known = list(dotted_names(cls))
    pending = iter(arguments)
    for argument in pending:
        if not argument.startswith("--"):
            raise ValueError(f"unexpected argument {in_short(argument)}: set a key as in --training.seed 2")
        name, equals, value = argument[2:].partition("=")
        name = "checkpoint.resume" if name == "resume" else name
        if name != "config" and name not in known:
            raise ValueError(f"unknown option --{name}{suggestion(name, known, '--')}")
        given = value if equals else next(pending, None)
        if given is None or (not equals and given.startswith("--")):
            raise ValueError(f"the option --{name} lacks a value: give one, as in --{name} VALUE")
        if name == "config":
            path = given
        else:
            pairs.append((name, given))
    if not path:
        raise ValueError(f"--config FILE is missing; usage: {USAGE}")
    return path_argument(path), pairs


def override(values: dict[str, Any], name: str, text: str, cls: type, prefix: str = "") -> None:
    """Set the key `name` of a config's values, in place, to the value `text`.

    For a whole section, `text` is YAML, as in `{start: 4, increment: 2}`, or the name of a YAML file. Its keys replace
    the old ones of that section.

    Raises ValueError if a section's text does not describe a section.
    """
    first, _, rest = name.partition(".")
    key = section_keys(cls)[first]
    if rest:
        if values.get(first) is None:
            values[first] = {}
        override(values[first], rest, text, key.kind, f"{prefix}{first}.")
    elif is_dataclass(key.kind):
        try:
            section = read_sections({first: parse_yaml(text)}, cls, prefix).get(first)
        except ValueError as error:
            raise ValueError(f"--{prefix}{first}: {error}") from None
        values[first] = merged(values.get(first) or {}, section) if section else section
        if section is None and not key.may_be_null:
            del values[first]
    else:
        values[first] = text

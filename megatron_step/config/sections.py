"""Check the values of a YAML file against the keys of a config's sections, and say what is wrong.

A section is a dataclass of this package. Its values are a dict by key; a section within it is again a dict.
"""

import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from megatron_step.config.paths import expand_path
from megatron_step.config.yaml_json import read_yaml

_SHOWN_CHARACTERS = 120


class Key(typing.NamedTuple):
    """A key of a section."""

    kind: Any
    """The key's type; X where the field is `X | None`."""
    may_be_null: bool
    """Whether the key may be null."""
    default: Any
    """The key's default; MISSING if a config must give the key."""


@lru_cache
def section_keys(cls: type) -> dict[str, Key]:
    """Return the keys of a section by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: _key(field, hints[field.name]) for field in fields(cls)}


def dotted_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the names of all keys, such as `model` and `model.num_layers`."""
    for name, key in section_keys(cls).items():
        yield prefix + name
        if is_dataclass(key.kind):
            yield from dotted_names(typing.cast(type, key.kind), f"{prefix}{name}.")


def read_sections(values: Any, cls: type, prefix: str = "") -> dict[str, Any]:
    """Return a section's values, with each inner section as a dict; an inner section without keys is left out.

    An inner section may also be the name of a YAML file that holds it.

    Raises ValueError for an unknown key, and for a value that should be a section.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{prefix[:-1] or 'the config'} is {in_short(values)}: it must be a section, with keys such as "
            f"{', '.join(list(section_keys(cls))[:3])}"
        )
    keys = section_keys(cls)
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name not in keys:
            raise ValueError(f"unknown config key {prefix}{in_short(name)}{suggestion(str(name), list(keys), prefix)}")
        key = keys[name]
        if is_dataclass(key.kind) and value is None:
            if key.may_be_null:
                read[name] = None
        elif is_dataclass(key.kind):
            read[name] = read_sections(_included(value), typing.cast(type, key.kind), f"{prefix}{name}.")
        else:
            read[name] = value
    return read


def as_section(values: Mapping[str, Any], cls: type, prefix: str) -> Any:
    """Make a section, and the sections inside it, from values by key.

    Raises ValueError for an unknown or missing key, and for a value of the wrong type.
    """
    read = read_sections(dict(values), cls, prefix)
    check_complete(read, cls, prefix)
    keys = section_keys(cls)
    for name, value in read.items():
        if is_dataclass(keys[name].kind) and isinstance(value, dict):
            read[name] = as_section(value, typing.cast(type, keys[name].kind), f"{prefix}{name}.")
    try:
        return cls(**read)
    except TypeError as error:
        raise ValueError(f"{prefix[:-1]} has a value of the wrong type: {error}") from None


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values `old` with those of `new` in place of the old ones, section by section."""
    both = {
        name: merged(old[name], value)
        for name, value in new.items()
        if isinstance(old.get(name), Mapping) and isinstance(value, Mapping)
    }
    return {**old, **new, **both}


@cache
def default_section(cls: type) -> Any:
    """Return the section with all defaults: always the same object, which shows that the section was left out."""
    return cls()


def check_complete(values: dict[str, Any], cls: type, prefix: str = "") -> None:
    """Raise ValueError if a key is missing, or is null but may not be."""
    keys = section_keys(cls)
    missing = [
        prefix + name
        for name, key in keys.items()
        if name not in values and key.default is MISSING and not is_dataclass(key.kind)
    ]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}: give {'it' if len(missing) == 1 else 'them'} a value")
    for name, key in keys.items():
        if is_dataclass(key.kind) and (name in values or key.default is MISSING):
            if values.get(name, {}) is not None:
                check_complete(values.get(name, {}), typing.cast(type, key.kind), f"{prefix}{name}.")
        elif name in values and values[name] is None and not key.may_be_null:
            default = "" if key.default is MISSING else f", or leave the key out for its default {key.default}"
            raise ValueError(f"{prefix}{name} is empty (null): give it a value{default}")


def expectation(cls: type, dotted: str) -> str:
    """Describe the values that a key such as `model.num_layers` takes."""
    *sections, name = dotted.split(".")
    for section in sections:
        cls = section_keys(cls)[section].kind
    key = section_keys(cls)[name]
    return _in_words(key.kind) + (" or null" if key.may_be_null else "")


def suggestion(name: str, known: list[str], prefix: str) -> str:
    """Return a question with the known name nearest to `name`, such as `; did you mean model.num_layers?`."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


def in_short(value: Any) -> str:
    """Return a value as an error shows it: on one line, and cut if it is long."""
    text = value if isinstance(value, str) and value.isprintable() and value == value.strip() else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _key(field: "Field[Any]", hint: Any) -> Key:
    default = field.default
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return Key(hint, False, default)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    may_be_null = len(kinds) < len(typing.get_args(hint))
    return Key(kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)], may_be_null, default)  # noqa: UP007


def _included(value: Any) -> Any:
    """Return a section's values; if `value` is the name of a YAML file, return that file's values."""
    if not isinstance(value, str) or not os.path.isfile(path := expand_path(value)):
        return value
    try:
        return read_yaml(Path(path))
    except OSError as error:
        raise ValueError(f"cannot read the section {path}: {error.strerror}") from None


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes, if it is a number)"}


def _in_words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"{'one of ' if len(parts) > 1 else ''}{', '.join(map(str, parts))}"
    if origin is list:
        return f"a list, each entry {_in_words(parts[0])}"
    if origin is tuple:
        return f"a list of {' and '.join(map(_in_words, parts))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_in_words, parts))
    return _WORDS.get(kind, "a section")

"""Read YAML and JSON files strictly: a key that a section gives twice is an error, since one value would be lost.

All files with settings are read here: configs, clusters, plans, and a model's or a tokenizer's files.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """Return the value that a YAML file holds. The file is UTF-8, or UTF-16 with a byte order mark.

    Raises OSError if the file cannot be read, and ValueError, with one line, if it is not valid YAML.
    """
    return _read(path, "YAML", parse_yaml)


def read_json(path: Path) -> Any:
    """Return the value that a JSON file holds. The file is UTF-8 (with or without a byte order mark), UTF-16 or UTF-32.

    Raises OSError if the file cannot be read, and ValueError, with one line, if it is not valid JSON.
    """
    return _read(path, "JSON", parse_json)


def _read(path: Path, language: str, parse: Callable[[bytes], Any]) -> Any:
    content = path.read_bytes()
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid {language}: {error}") from None


def parse_yaml(content: str | bytes) -> Any:
    """Return the value of YAML text.

    Raises ValueError, with one line, if the text is not valid YAML or gives a key twice (with both line numbers).
    """
    try:
        return yaml.load(content, Loader=_StrictLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # A value with a wrong tag, such as `!!int x`, makes PyYAML raise Python's own errors.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(_one_line(error)) from None


def parse_json(content: str | bytes) -> Any:
    """Return the value of JSON text.

    Raises ValueError, with one line, if the text is not valid JSON or if an object gives a key twice.
    """
    try:
        return json.loads(content, object_pairs_hook=_object)
    except _DoubledKeyError as error:
        raise ValueError(_with_lines(error.key, content)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(_one_line(error)) from None


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with three changes.

    A mapping gives no key twice. Dates stay text, because a folder may be one. Numbers that YAML 1.1 reads in an
    unexpected base stay text, too: 010 is 8 there, and 1:30 is 90.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise ValueError(f"the key {key.value} is given twice, in lines {lines[name]} and {line}: keep one")
                lines[name] = line
        return node


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)$")
for _first in "-+0123456789":
    _StrictLoader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", _OTHER_BASE))


class _DoubledKeyError(Exception):
    """A key that a JSON object gives twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DoubledKeyError(key)
            seen.add(key)
    return values


def _with_lines(key: str, content: str | bytes) -> str:
    """Name the key that an object gives twice, and the lines with that name: the parser does not report lines."""
    text = content if isinstance(content, str) else content.decode(json.detect_encoding(content))
    name = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
    lines = [number for number, line in enumerate(text.splitlines(), 1) for _ in name.findall(line)]
    places = f" (see lines {', '.join(map(str, lines))})" if lines else ""
    return f"the key {key} is given twice in one object{places}: keep one"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Read YAML and JSON files strictly: a key that stands twice in one section is refused, since one value would be lost.

Every file with settings is read here, whoever wrote it: configs, clusters, plans, a model's or a tokenizer's files.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """Return the value that a YAML file holds. The file is UTF-8, or UTF-16 with a byte order mark.

    Raises OSError if it cannot be read, and ValueError, with one line that names the file, if it is not valid YAML.
    """
    content = path.read_bytes()
    try:
        return parse_yaml(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None


def parse_yaml(content: str | bytes) -> Any:
    """Return the value of YAML text.

    Raises ValueError, with one line, if it is not valid YAML or gives a key twice; the line numbers of both are named.
    """
    try:
        return yaml.load(content, Loader=_StrictLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML lets the errors of a value with a wrong tag through, such as that of `!!int x` or `!!bool x`.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(_one_line(error)) from None


def read_json(path: Path) -> Any:
    """Return the value that a JSON file holds. The file is UTF-8, with or without a byte order mark, UTF-16 or UTF-32.

    Raises OSError if it cannot be read, and ValueError, with one line that names the file, if it is not valid JSON.
    """
    content = path.read_bytes()
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def parse_json(content: str | bytes) -> Any:
    """Return the value of JSON text.

    Raises ValueError, with one line, if it is not valid JSON or gives a key of an object twice.
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
    """PyYAML's safe loader; a key may stand once in a mapping, and a date is text, as the name of a folder may be."""

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


class _DoubledKeyError(Exception):
    """A key of a JSON object that stands in it twice."""

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
    """Say which key stands twice, and in which lines its name stands: the parser itself does not say."""
    text = content if isinstance(content, str) else content.decode(json.detect_encoding(content))
    name = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
    lines = [number for number, line in enumerate(text.splitlines(), 1) for _ in name.findall(line)]
    places = f" (it stands in lines {', '.join(map(str, lines))})" if lines else ""
    return f"the key {key} is given twice in one object{places}: keep one"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Modules outside the package that a config names, so that every process of a run has what they add.

A plugin may have
    hooks       a list of functions that are called after each step
    trackers    a list of tracker classes, or of functions that make trackers
and calls `register` for each growth operator and each policy for old layers as it is imported.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def import_plugins(names: Sequence[str]) -> list[ModuleType]:
    """Import the modules, once in a process.

    Raises ValueError if one cannot be found or raises an error.
    """
    return [_import(name) for name in names]


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"plugins: there is no module {name}: start in its folder, or add its folder to PYTHONPATH"
            ) from None
        raise ValueError(f"plugins: the module {name} needs {error.name}, which is not installed") from error
    except Exception as error:
        raise ValueError(f"plugins: the module {name} cannot be imported: {type(error).__name__}: {error}") from error


def plugin_list(plugins: Sequence[ModuleType], attribute: str) -> list[Any]:
    """What the plugins have in their lists `hooks` or `trackers`.

    Raises ValueError if one of them is no list of functions.
    """
    found: list[Any] = []
    for plugin in plugins:
        values = getattr(plugin, attribute, [])
        if not isinstance(values, (list, tuple)) or not all(callable(value) for value in values):
            raise ValueError(f"plugins: {plugin.__name__}.{attribute} is not a list of functions")
        found += values
    return found

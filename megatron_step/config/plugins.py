"""Modules outside the package that a config names; every process of a run imports them.

A plugin may define
    hooks       a list of functions that are called after each step
    trackers    a list of tracker classes, or of functions that make trackers
and may call `register` for growth operators and for policies for old layers when it is imported.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def import_plugins(names: Sequence[str]) -> list[ModuleType]:
    """Import the named modules, each once per process.

    Raises ValueError if a module cannot be found or raises an error.
    """
    return [_import(name) for name in names]


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"plugins: there is no module {name}: start the command in the module's folder, or add its folder to "
                "PYTHONPATH"
            ) from None
        raise ValueError(
            f"plugins: the module {name} needs {error.name}, which is not installed: install {error.name}"
        ) from error
    except Exception as error:
        raise ValueError(f"plugins: the module {name} cannot be imported: {type(error).__name__}: {error}") from error


def plugin_list(plugins: Sequence[ModuleType], attribute: str) -> list[Any]:
    """Return the entries of the plugins' lists `attribute`, which is `hooks` or `trackers`.

    Raises ValueError if a plugin's `attribute` is not a list of functions.
    """
    found: list[Any] = []
    for plugin in plugins:
        values = getattr(plugin, attribute, [])
        if not isinstance(values, (list, tuple)) or not all(callable(value) for value in values):
            raise ValueError(f"plugins: {plugin.__name__}.{attribute} is not a list of functions: make it one")
        found += values
    return found

"""Paths with `~` and `$VARIABLE`, which a shell would expand, in configs and in arguments."""

import os
import re
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


class PathError(ArgumentTypeError, ValueError):
    """A path that cannot be expanded. argparse prints the error's text as the error of an option."""


def expand_path(text: str) -> str:
    """Return `text` with `~`, `~user`, `$VARIABLE` and `${VARIABLE}` expanded.

    If a file with exactly this name exists, a `$` in its name stays as it is.

    Raises PathError, a ValueError, for an unknown user, for a variable that is not set, and for a NUL character.
    """
    if "\0" in text or (not text.isascii() and not _can_be_encoded(text)):
        raise PathError(f"the path {text!r} holds a character that no file name can hold: remove it")
    expanded = os.path.expanduser(text if os.path.lexists(text) else _VARIABLE.sub(partial(_value, text), text))
    if expanded.startswith("~"):
        user = expanded[1:].partition("/")[0]
        raise PathError(
            f"the path {text} begins with the home folder of user {user}, who does not exist on this machine: write "
            "the path out, or begin it with ./ if the folder's name begins with ~"
        )
    return expanded


def _can_be_encoded(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _value(path: str, variable: re.Match[str]) -> str:
    name = variable[1] or variable[2]
    if name not in os.environ:
        raise PathError(
            f"the path {path} uses the environment variable {name}, which is not set: set {name}, or write the path out"
        )
    return os.environ[name]


def path_argument(text: str) -> Path:
    """Return the path that a command-line argument names. Use it as argparse's `type`.

    Raises PathError as `expand_path` does.
    """
    return Path(expand_path(text))

"""Paths as people write them: `~` and `$VARIABLE` stand for folders, in configs as in a shell."""

import os
import re
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


class PathError(ArgumentTypeError, ValueError):
    """A path that cannot be meant as it is written; argparse shows its text as the error of an option."""


def expand_path(text: str) -> str:
    """Return `text` with `~`, `~user`, `$VARIABLE` and `${VARIABLE}` replaced by what they stand for.

    A `$` in the name of a file that exists under this very name is part of the name.

    Raises PathError, a ValueError, for a user or a variable that this machine does not know, and for a NUL character.
    """
    if "\0" in text or (not text.isascii() and not _can_be_encoded(text)):
        raise PathError(f"the path {text!r} holds a character that no file name can hold: remove it")
    expanded = os.path.expanduser(text if os.path.lexists(text) else _VARIABLE.sub(partial(_value, text), text))
    if expanded.startswith("~"):
        user = expanded[1:].partition("/")[0]
        raise PathError(
            f"the path {text} begins with the home of a user {user}, whom this machine does not know: write it out, or "
            "begin it with ./ if the folder's name does begin with ~"
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
            f"the path {path} names the environment variable {name}, which is not set: set it, or write the path out"
        )
    return os.environ[name]


def path_argument(text: str) -> Path:
    """Return the path that a command-line argument names; the `type` of such an argument of argparse."""
    return Path(expand_path(text))

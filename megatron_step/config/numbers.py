"""Checks of the numbers in a config, and the numbers that an error suggests instead of a wrong one."""

from collections.abc import Callable
from dataclasses import fields
from math import isfinite
from typing import Any

_FARTHEST = 8
"""Largest ratio of a suggested number to the number that it replaces."""


def check_finite(section: str, values: Any) -> None:
    """Raise ValueError if a number of a dataclass, or of a list in it, is infinite or not a number."""
    for field in fields(values):
        value = getattr(values, field.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not isfinite(number):
                raise ValueError(f"{section}.{field.name} must be a finite number, not {number}")


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError if numpy's and torch's generators cannot take `seed`."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name} must lie in [0, 2^32), not {seed}")


def nearest(value: int, fits: Callable[[int], bool]) -> list[int]:
    """Return the nearest positive numbers below and above `value` for which `fits` returns True."""
    lower = next((number for number in range(min(value, 1 << 20) - 1, 0, -1) if fits(number)), None)
    upper = next(
        (number for number in range(max(value, 0) + 1, _FARTHEST * min(max(value, 8), 1 << 20)) if fits(number)), None
    )
    return [number for number in (lower, upper) if number is not None]


def remedy(*choices: tuple[str, list[int]]) -> str:
    """Return an error's suggestion, such as `set model.num_layers to 4 or 8, or stages.count to 2`.

    `choices` are pairs of a key and the values that it may take. Keys without values are left out; if no key has any,
    the suggestion only names the keys to change.
    """
    parts = [f"{name} to {' or '.join(map(str, values))}" for name, values in choices if values]
    return f"set {', or '.join(parts)}" if parts else f"change {' or '.join(name for name, _ in choices)}"

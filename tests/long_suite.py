"""The choice of cases for `make test` and for `make test-long`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(every: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return all cases as parameters of a test; those outside `kept` are marked `long`.

    A full product of settings takes more than an hour. `kept` holds each pair of settings once.
    """
    every = list(every)
    unknown = [case for case in kept if case not in every]
    assert unknown == [], f"no such cases: {unknown}"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else pytest.mark.long)
        for case in every
    ]

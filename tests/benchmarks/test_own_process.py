import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from benchmarks.own_process import own_process


@contextmanager
def counter(start: int) -> Iterator[dict[str, Callable[[], int]]]:
    values = [start]

    def count() -> int:
        values.append(values[-1] + 1)
        return values[-1]

    yield {"count": count, "pid": os.getpid}


@contextmanager
def broken() -> Iterator[dict[str, Callable[[], None]]]:
    def fail() -> None:
        raise SystemExit(3)

    yield {"fail": fail}


def test_each_process_keeps_its_own():
    with own_process(partial(counter, 0)) as first, own_process(partial(counter, 10)) as second:
        assert [first("count"), second("count"), first("count")] == [1, 11, 2]
        assert len({first("pid"), second("pid"), os.getpid()}) == 3


def test_a_process_that_fails_is_an_error():
    with own_process(broken) as call:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="exit code 3"):
                call("fail")

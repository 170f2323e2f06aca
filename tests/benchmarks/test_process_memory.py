import time

import pytest

from benchmarks.process_memory import process_peak_bytes


def hold(mebibytes: int) -> None:
    content = b"x" * (mebibytes << 20)
    time.sleep(0.2)
    assert content


def fail() -> None:
    raise SystemExit(3)


def test_the_peak_holds_what_is_held() -> None:
    small, large = (process_peak_bytes(hold, (mebibytes,)) / 2**20 for mebibytes in (1, 201))
    assert 150 < large - small < 250


def test_a_process_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        process_peak_bytes(fail, ())

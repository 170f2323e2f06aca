"""A failing tracker gives one warning, and is tried again, but not so often that it slows training."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
from small_run import small_config

from megatron_step.training.trackers import tracker as tracker_module
from megatron_step.training.trackers.tracker import Metrics, TrackedRun, guarded

RUN = TrackedRun(small_config(), num_steps=10, first_step=0)


class Service:
    """Takes metrics, but for the steps in `fails`."""

    def __init__(self, run: TrackedRun, fails: set[int], work: Callable[[], None] = lambda: None) -> None:
        self.run, self.fails, self.work = run, fails, work
        self.taken: list[int] = []
        self.closed = 0

    def write(self, metrics: Metrics, shown: bool) -> None:
        self.work()
        if metrics["step"] in self.fails:
            raise ConnectionError("the network\nis down")
        self.taken.append(metrics["step"])

    def close(self) -> None:
        self.closed += 1


def _tracked(service: Service, steps: range = range(1, 6)) -> None:
    with guarded(lambda run: service, RUN) as write:
        for step in steps:
            write({"step": step}, True)


def test_a_tracker_gets_every_step_and_is_closed_once() -> None:
    service = Service(RUN, set())
    _tracked(service)
    assert service.taken == [1, 2, 3, 4, 5]
    assert service.closed == 1


def test_a_failure_is_said_once_and_later_steps_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    service = Service(RUN, {2, 4})

    with guarded(lambda run: service, RUN) as write:
        for step in range(1, 6):
            write({"step": step}, True)
            cast(Any, write).__self__._next_try = 0.0  # the pause is over
    assert service.taken == [1, 3, 5]
    assert capsys.readouterr().err.splitlines() == [
        "warning: Service could not write step 2: ConnectionError: the network is down; training goes on",
        "warning: Service missed 2 steps",
    ]


def test_a_slow_failure_is_followed_by_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(tracker_module, "monotonic", lambda: now[0])

    def five_seconds() -> None:
        now[0] += 5

    service = Service(RUN, {1, 2}, five_seconds)
    with guarded(lambda run: service, RUN) as write:
        for step in range(1, 61):
            write({"step": step}, True)
            now[0] += 1
    assert service.taken[0] == 51, "asked again 50 seconds after the failure"


def test_a_tracker_that_cannot_start_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def start(run: TrackedRun, address: str) -> Service:
        raise OSError(f"nothing listens at {address}")

    with guarded(partial(start, address="here"), RUN) as write:
        write({"step": 1}, True)
    assert capsys.readouterr().err == (
        "warning: start could not start: OSError: nothing listens at here; training goes on without it\n"
    )


def test_a_stop_from_the_keyboard_is_no_failure() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    service = Service(RUN, set(), stop)
    with pytest.raises(KeyboardInterrupt):
        _tracked(service)
    assert service.closed == 1


def test_a_tracker_that_changes_its_metrics_changes_no_others() -> None:
    class Takes(Service):
        def write(self, metrics: Metrics, shown: bool) -> None:
            metrics.clear()

    metrics = {"step": 1, "loss": 2.0}
    with guarded(lambda run: Takes(RUN, set()), RUN) as write:
        write(metrics, True)
    assert metrics == {"step": 1, "loss": 2.0}

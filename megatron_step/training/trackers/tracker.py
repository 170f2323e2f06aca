"""Trackers: objects that take the metrics of a run, such as a file, a progress bar or a service."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Protocol

from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig
from megatron_step.engine.messages import warn

Metrics = dict[str, Any]
"""One line of metrics.jsonl."""


class Tracker(Protocol):
    """Takes the metrics of each step. Only rank 0 has trackers."""

    def write(self, metrics: Metrics, shown: bool) -> None:
        """Take the metrics of one step; `shown` is True for the steps that `logging.interval` selects."""

    def close(self) -> None:
        """Write what is left, once, when training ends or fails."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker follows."""

    config: RunConfig
    """The run's config."""
    num_steps: int
    """Steps of the whole run."""
    first_step: int
    """Finished steps when this process began. Later steps that an earlier process tracked are trained again."""


MakeTracker = Callable[[TrackedRun], Tracker]
"""A function that makes the tracker of a run, or a tracker class whose constructor takes a `TrackedRun`."""

_SHARE = 10  # a tracker that fails slowly takes at most a tenth of the run's time


@contextmanager
def guarded(make: MakeTracker, run: TrackedRun) -> Iterator[Callable[[Metrics, bool], None]]:
    """Make a tracker, yield its `write` and close it. Its errors are reported once and do not end training.

    A tracker that cannot be made is left out. A tracker that fails to write is tried again after ten times the duration
    of its failure.
    """
    guard = _Guard(make, run)
    try:
        yield guard.write
    finally:
        guard.close()


class _Guard:
    """A tracker that does not raise."""

    def __init__(self, make: MakeTracker, run: TrackedRun) -> None:
        self._missed = 0  # shown steps that it did not take
        self._next_try = 0.0
        self._tracker: Tracker | None = None
        try:
            self._tracker = make(run)
        except Exception as error:
            warn(f"{_name(make)} could not start: {_reason(error)}; training goes on without it")

    def write(self, metrics: Metrics, shown: bool) -> None:
        start = monotonic()
        if self._tracker is None:
            return
        if start < self._next_try:
            self._missed += shown
            return
        try:
            self._tracker.write(dict(metrics), shown)
        except Exception as error:
            if not self._missed:
                name = type(self._tracker).__name__
                warn(f"{name} could not write step {metrics['step']}: {_reason(error)}; training goes on")
            self._missed += 1
            end = monotonic()
            self._next_try = end + _SHARE * (end - start)

    def close(self) -> None:
        if self._tracker is None:
            return
        name = type(self._tracker).__name__
        if self._missed:
            warn(f"{name} missed {counted(self._missed, 'step')}")
        try:
            self._tracker.close()
        except Exception as error:
            warn(f"{name} could not close: {_reason(error)}")


def _name(make: Any) -> str:
    make = make.func if isinstance(make, partial) else make
    return getattr(make, "__name__", type(make).__name__)


def _reason(error: Exception) -> str:
    """Return the error's text in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

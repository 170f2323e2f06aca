"""Requests to stop: SIGTERM, which a cluster sends before it takes a machine back, and SIGUSR1, as SLURM can send."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
"""Exit status of a run that saved and stopped because it was asked to: start it again to go on (EX_TEMPFAIL)."""


class StopRequest:
    """Whether this process was asked to stop; looked at between steps."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGUSR1 into a request that a step in progress outlives; outside the main thread, none comes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Requests to stop: SIGINT (Control-C), SIGHUP (the terminal is gone), SIGTERM and SIGUSR1 (from a cluster).

Before training, a signal stops the process at once, since there is nothing to lose. During training, the process first
finishes the current step and saves a checkpoint. A second Control-C ends the process at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType

EXIT_STOPPED = 75
"""Exit status of a run that saved and stopped after a signal (EX_TEMPFAIL): start the run again to continue it."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
"""The signals that ask a run to stop."""
# A terminal sends Control-C to torchrun and to its processes, and torchrun sends it to them a second time.
_FORWARDED_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class Stopped(BaseException):
    """A request to stop before training, to this or another rank. A BaseException, which libraries do not catch."""


class StopRequest:
    """A flag that is true once this process was asked to stop; training checks it between steps."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._noted_at = 0.0
        self._finishes_step = False

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """Only remember a signal within the block, so that the current step can be finished and saved."""
        self._finishes_step = True
        try:
            yield
        finally:
            self._finishes_step = False

    def note(self, number: int) -> None:
        """Remember a signal, and raise Stopped outside `after_step`; a second SIGINT ends the process."""
        if self.signal_name is None:
            self.signal_name, self._noted_at = signal.Signals(number).name, monotonic()
            if not self._finishes_step:
                raise Stopped(f"stopped by {self.signal_name} before training began")
            _say(f"{self.signal_name}: the run finishes and saves this step, then stops; Control-C stops it at once")
        elif number == signal.SIGINT and monotonic() - self._noted_at >= _FORWARDED_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn signals into a request to stop during the block. Outside the main thread no signal arrives.

    A signal that the process was started to ignore (nohup, a shell's background job) stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # a fork that writes a checkpoint ignores the terminal's Control-C
            request.note(number)

    taken = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in taken}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """Write a line from a signal handler, where `print` could fail inside a `print` that the signal interrupted."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # the terminal is gone
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())

"""Requests to stop: SIGINT (Control-C), SIGTERM, which a cluster sends before it takes a machine back, and SIGUSR1.

Before training a signal stops the process at once: nothing would be lost. While it trains, the step in progress is
finished and saved first. A second Control-C then ends the process at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

EXIT_STOPPED = 75
"""Exit status of a run that saved and stopped because it was asked to: start it again to go on (EX_TEMPFAIL)."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# torchrun gets the Control-C of a terminal as its processes do, and sends it to them once more.
_FORWARDED_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class Stopped(BaseException):
    """This process, or another rank, was asked to stop before it trained. No Exception: libraries must not catch it."""


class StopRequest:
    """Whether this process was asked to stop; looked at between steps."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._noted_at = 0.0
        self._finishes_step = False

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """Within the block a signal is only noted, so that the step in progress can be finished and saved."""
        self._finishes_step = True
        try:
            yield
        finally:
            self._finishes_step = False

    def note(self, number: int) -> None:
        """Take a signal: remember it, and raise Stopped outside `after_step`; a second SIGINT ends the process."""
        if self.signal_name is None:
            self.signal_name, self._noted_at = signal.Signals(number).name, monotonic()
            if not self._finishes_step:
                raise Stopped(f"asked to stop by {self.signal_name} before training began")
            _say(f"{self.signal_name}: this step is finished and saved before the run stops; Control-C stops at once")
        elif number == signal.SIGINT and monotonic() - self._noted_at >= _FORWARDED_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the signals into a request; outside the main thread, which alone gets them, into none.

    A SIGINT that the process was started to ignore (nohup, a shell's background job) stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # a fork that writes a checkpoint gets the terminal's Control-C, too: it goes on
            request.note(number)

    taken = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in taken}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """Write a line from within a signal handler, where print could meet a print that the signal interrupted."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())

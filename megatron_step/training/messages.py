"""What a run says on its standard output and standard error: a stream that takes nothing does not end training."""

import contextlib
import functools
import os
import sys


def say(text: str) -> None:
    """Print a line of the run's log.

    A full disk or a closed pipe behind standard output is said once, as are letters that its encoding does not have.
    What a full disk has not taken waits in the stream's buffer.
    """
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        _standard_output_failed(getattr(error, "strerror", None) or str(error))


def warn(text: str) -> None:
    """Print a warning on standard error; do nothing if standard error takes no text either."""
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


@functools.cache
def _standard_output_failed(reason: str) -> None:
    warn(f"cannot write to standard output: {reason}; training goes on")


def discard_unwritten() -> None:
    """Drop what standard output or error has not taken, which would change the exit status as the process ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as it is where the process was started with the stream closed
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

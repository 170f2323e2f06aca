"""Lines and warnings for people. Training goes on if standard output or standard error cannot be written."""

import contextlib
import functools
import os
import sys


def say(text: str) -> None:
    """Print a line of the run's log.

    If standard output fails, one warning says so: because of a full disk, a closed pipe, or a letter that its encoding
    lacks. Text that a full disk does not take waits in the stream's buffer.
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
    """Drop text that cannot be written to standard output or error, since it would change the process's exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None if the process was started with the stream closed
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

"""Let a command finish if the reader of its output closes the pipe early, as in `megatron-step plan ... | head`."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Pipe(io.FileIO):
    """A file that accepts all writes, and drops them once the reader of its pipe has closed the pipe."""

    def write(self, content: Any, /) -> int:
        """Write bytes; they are dropped if the reader has closed its end."""
        try:
            return super().write(content)
        except BrokenPipeError:
            return memoryview(content).nbytes


@contextmanager
def reader_may_go() -> Iterator[None]:
    """Within the block, let the command continue if nobody reads its standard output or standard error any more."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams


def _tolerant(stream: TextIO) -> TextIO:
    """Return the stream as one whose reader may close early; return a stream without a file, as in tests, unchanged."""
    try:
        descriptor = stream.fileno()
        stream.flush()
    except (OSError, AttributeError, ValueError):
        return stream
    file = io.BufferedWriter(_Pipe(descriptor, "w", closefd=False))
    line_buffering = bool(getattr(stream, "line_buffering", True))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=line_buffering)

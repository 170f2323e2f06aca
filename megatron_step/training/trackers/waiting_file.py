"""A file that a run appends to; if the disk is full, records wait in memory and training goes on."""

from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from megatron_step.engine.messages import warn

_MOST_WAITING_BYTES = 16 << 20


class WaitingFile:
    """Adds records at the end of a file. What the file system does not take waits in memory for the next record.

    If the file cannot be written, because of a full disk, a quota or a folder without write permission, one warning
    says so. When there is room again, a half-written record continues where it stopped.
    """

    def __init__(self, path: Path, prepare: Callable[[Path], None] | None = None) -> None:
        """Open the file. If it exists, `prepare(path)` is called before the first record; it may raise OSError."""
        self._path = path
        self._prepare = prepare
        self._stream: FileIO | None = None
        self._waiting = bytearray()
        self._left_out = 0
        self._reason: str | None = None
        self.add(b"")

    def add(self, record: bytes) -> None:
        """Add a record after those that still wait; drop it if 16 MiB wait already."""
        if len(self._waiting) + len(record) > _MOST_WAITING_BYTES:
            self._left_out += 1
        else:
            self._waiting += record
        try:
            self._write()
        except OSError as error:
            self._say(error)
            self._reopen_later()

    def _write(self) -> None:
        if self._prepare is not None and self._path.is_file():
            self._prepare(self._path)
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = FileIO(self._path, "a")
        self._prepare = None
        while self._waiting:
            del self._waiting[: self._stream.write(self._waiting)]

    def _reopen_later(self) -> None:
        """Close the stream, because a stale handle of a network file system stays unusable."""
        with suppress(OSError):
            if self._stream is not None:
                self._stream.close()
        self._stream = None

    def close(self) -> None:
        """Write the records that still wait, and warn if some cannot be written."""
        self.add(b"")
        try:
            if self._stream is not None:
                self._stream.close()
        except OSError as error:
            self._say(error)  # a network file system may report a full disk only now
        if self._waiting or self._left_out:
            warn(f"the last records of {self._path} are missing: {self._reason}")

    def _say(self, error: OSError) -> None:
        if self._reason is None:
            warn(f"cannot write {self._path}: {error.strerror}; training goes on, and records wait in memory")
        self._reason = error.strerror or str(error)

"""Atomic writes (a file is complete or does not exist), and files that Git LFS did not fetch."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LFS_START = b"version https://git-lfs.github.com/spec/"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file to, and rename the file to `path` once it is on disk.

    A crash leaves the old file or the new one. If the block raises, the old file stays and the new one is removed.
    Processes, on one machine or several, may write the same file at the same time: the last one wins.

    Raises OSError if the folder is missing or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file of text (as UTF-8) or bytes, as `whole_file` does."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def is_git_lfs_pointer(path: Path) -> bool:
    """Return whether a file is the few lines that Git puts in place of a large file that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS_START)) == _LFS_START

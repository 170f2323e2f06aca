"""Atomic creation of a folder: it is complete or does not exist."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_step.checkpoint.directory import sync_folder
from megatron_step.engine.output_lock import lock_beside, output_lock


@contextmanager
def new_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """Give a temporary folder to write into, and rename it to `folder` after the block; after an error, delete it.

    Leftovers of a killed process for the same folder are deleted, too.

    Raises FileExistsError if `folder` exists, InUseError if another process writes it, and OSError if the disk has less
    than `needed_bytes` free.
    """
    check_new(folder)
    with output_lock(lock_beside(folder), folder):
        check_new(folder)  # the last holder of the lock may have made it
        partial = folder.absolute().parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            free = shutil.disk_usage(partial).free
            if free < needed_bytes:
                raise OSError(
                    f"{folder} needs {needed_bytes / 2**20:,.0f} MiB, but only {free / 2**20:,.0f} MiB are free: "
                    "choose another disk, or free some space"
                )
            yield partial
            for path in (partial, *partial.rglob("*")):
                _sync(path)
            os.rename(partial, folder)
            sync_folder(partial.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Raise FileExistsError if `folder` exists."""
    if folder.exists():
        raise FileExistsError(f"{folder} already exists: choose another output folder, or remove it")


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())

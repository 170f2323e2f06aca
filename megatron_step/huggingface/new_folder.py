"""A folder that is there as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_step.checkpoint.directory import sync_folder
from megatron_step.engine.output_lock import lock_beside, output_lock


@contextmanager
def new_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into, which gets the name `folder` when the block ends well, and goes when it does not.

    What a killed process left over of the same folder goes, too. Raises FileExistsError if there is something at
    `folder`, InUseError if another process writes it, and OSError if its disk has no room for `needed_bytes`.
    """
    check_new(folder)
    with output_lock(lock_beside(folder), folder):
        check_new(folder)  # who had the lock until now may have made it
        partial = folder.absolute().parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            free = shutil.disk_usage(partial).free
            if free < needed_bytes:
                raise OSError(f"{folder} needs {needed_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free")
            yield partial
            for path in (partial, *partial.rglob("*")):
                _sync(path)
            os.rename(partial, folder)
            sync_folder(partial.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Raise FileExistsError if there is something at `folder`, before any work for it starts."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: choose another output folder, or remove it")


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())

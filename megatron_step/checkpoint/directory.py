"""Checkpoints as folders: their names, which are there, which are kept.

checkpoints/step_00000100/                  complete: it got its name in one rename after all of it was on disk
checkpoints/.saving_step_00000200_xyz/      being written, or left over from a crash
checkpoints/set_aside_step_00000300_xyz/    the run went back behind it: kept, and no longer counted
"""

import os
import re
import shutil
import uuid
from pathlib import Path

_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL_PREFIX = ".saving_"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every finished checkpoint in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def make_partial(folder: Path, step: int) -> Path:
    """A new, empty folder for a checkpoint that is being written."""
    path = folder / f"{_PARTIAL_PREFIX}{checkpoint_name(step)}_{uuid.uuid4().hex[:8]}"
    path.mkdir(parents=True)
    return path


def publish(partial: Path, step: int) -> Path:
    """Give a written checkpoint its name, in one step that a crash cannot split; replaces one of the same step."""
    final = partial.parent / checkpoint_name(step)
    sync_folder(partial)
    if final.exists():
        replaced = partial.parent / f"{_PARTIAL_PREFIX}replaced_{uuid.uuid4().hex[:8]}"
        os.rename(final, replaced)
        os.rename(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(partial, final)
    sync_folder(partial.parent)
    return final


def remove_partial(folder: Path) -> None:
    """Remove what crashed saves left over."""
    if folder.is_dir():
        for path in folder.glob(f"{_PARTIAL_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, step: int, keep: int, keep_every: int) -> list[Path]:
    """Remove all checkpoints up to `step` but the `keep` newest (0: all) and multiples of `keep_every` (0: none).

    Later ones neither go nor count: they are damaged, or the run went back behind them by its user's wish.
    """
    if keep == 0:
        return []
    removed = []
    reached = [(saved, path) for saved, path in list_checkpoints(folder) if saved <= step]
    for saved, path in reached[:-keep]:
        if keep_every and saved % keep_every == 0:
            continue
        # Renamed first, so that a crash in the middle leaves no checkpoint that looks finished.
        doomed = folder / f"{_PARTIAL_PREFIX}removed_{uuid.uuid4().hex[:8]}"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(path)
    return removed


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, so that the run no longer finds them; return their new paths.

    A run that goes back to an older checkpoint writes another history: its newest one must be found from then on.
    """
    later = [path for saved, path in list_checkpoints(folder) if saved > step]
    return [path.rename(path.with_name(f"set_aside_{path.name}_{uuid.uuid4().hex[:8]}")) for path in later]


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

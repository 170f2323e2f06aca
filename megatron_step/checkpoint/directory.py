"""Checkpoints as folders: their names, the finished ones, and those that are kept.

checkpoints/step_00000100/                  complete: renamed to this in one step, after all of it was on disk
checkpoints/.saving_step_00000200_xyz/      being written, or left over from a crash
checkpoints/set_aside_step_00000300_xyz/    the run went on from an earlier checkpoint: kept, but no longer used
"""

import os
import re
import shutil
import uuid
from pathlib import Path

_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL_PREFIX = ".saving_"


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the step and the path of every finished checkpoint in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def make_partial(folder: Path, step: int) -> Path:
    """Make a new, empty folder for a checkpoint that is being written."""
    path = folder / f"{_PARTIAL_PREFIX}{checkpoint_name(step)}_{uuid.uuid4().hex[:8]}"
    path.mkdir(parents=True)
    return path


def publish(partial: Path, step: int) -> Path:
    """Give a written checkpoint its name in one atomic step. A checkpoint of the same training step is replaced."""
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
    """Remove the folders that crashed saves left over."""
    if folder.is_dir():
        for path in folder.glob(f"{_PARTIAL_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, step: int, keep: int, keep_every: int) -> list[Path]:
    """Remove the checkpoints up to `step`, except the newest `keep` (0: all) and multiples of `keep_every` (0: none).

    Later checkpoints are neither removed nor counted: they are damaged, or the user resumed from an earlier one.
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

    A run that resumes from an older checkpoint writes new ones; from then on, its newest checkpoint must be found.
    """
    later = [path for saved, path in list_checkpoints(folder) if saved > step]
    return [path.rename(path.with_name(f"set_aside_{path.name}_{uuid.uuid4().hex[:8]}")) for path in later]


def sync_folder(folder: Path) -> None:
    """Wait until the entries of the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Find text files in folders, through symbolic links, with suffixes in upper or lower case."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_step.config.counts import counted
from megatron_step.data.text_streams import COMPRESSED_SUFFIXES
from megatron_step.engine.files import is_git_lfs_pointer

_FORMATS = {
    ".txt": ".txt",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".json",
    ".parquet": ".parquet",
}
KINDS = f".txt, .jsonl, .ndjson and .json, plain or compressed ({', '.join(COMPRESSED_SUFFIXES)}), and .parquet"
"""The supported kinds of text files, for messages."""
_NAMED = 20


class TextFiles(NamedTuple):
    """The text files of an input, and the files that are not read."""

    files: list[Path]
    """Files to read, in order."""
    left_out: list[tuple[Path, str]]
    """Entries of folders that are not read, each with the reason."""

    @property
    def report(self) -> list[str]:
        """Lines that count and name the files that are left out; empty if all are read."""
        if not self.left_out:
            return []
        reasons = Counter(reason for _, reason in self.left_out)
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        lines = [f"left out {counted(len(self.left_out), 'entry', 'entries')} in the folders of the input: {counts}"]
        lines += [f"  {path}: {reason}" for path, reason in self.left_out[:_NAMED]]
        return [*lines, f"  and {len(self.left_out) - _NAMED:,} more"] if len(self.left_out) > _NAMED else lines


def text_format(path: Path) -> str | None:
    """Return `.txt`, `.jsonl`, `.json` or `.parquet`, also for a compressed file; None for any other file."""
    compressed = path.suffix.lower() in COMPRESSED_SUFFIXES
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    return None if compressed and suffix == ".parquet" else _FORMATS.get(suffix)


def find_text_files(inputs: Sequence[str | Path]) -> TextFiles:
    """Return the text files that `inputs` name: the named files, and all text files in named folders, sorted by path.

    Folders are searched with their subfolders and links; each file and each folder counts once. Hidden files, and files
    in hidden folders, are left out: version control, notebooks and macOS keep copies there.

    Raises FileNotFoundError for a path that does not exist, and OSError for a folder that cannot be searched. Raises
    ValueError for a file that is of an unknown kind, empty or named twice, and if there is no text file.
    """
    found = TextFiles([], [])
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"the input {given} does not exist: give a text file or a folder")
        if given.is_dir():
            inside = _search(given)
            if not inside.files:
                raise ValueError(
                    "; ".join([f"the folder {given} holds no text file: text is read from {KINDS}", *inside.report])
                )
            found.files.extend(inside.files)
            found.left_out.extend(inside.left_out)
        elif not given.is_file():
            raise ValueError(f"{given} is not a regular file: save its text in a file, and give that")
        elif not text_format(given):
            raise ValueError(f"{given} is a file of an unknown kind: text is read from {KINDS}")
        elif given.stat().st_size == 0:
            raise ValueError(f"{given} is empty: remove it from the input")
        elif is_git_lfs_pointer(given):
            raise ValueError(f"{given} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull")
        else:
            found.files.append(given)
    if not found.files:
        raise ValueError("no input given: name at least one text file or folder")
    seen: set[Path] = set()
    for file in found.files:
        if file.resolve() in seen:
            raise ValueError(f"the input names {file} twice: give each file once")
        seen.add(file.resolve())
    return found


def _search(folder: Path) -> TextFiles:
    """Return the text files in a folder and its subfolders; a file with two names is read under the first."""
    found, seen = TextFiles([], []), set[Path]()
    for path in sorted(_files_below(folder)):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        reason = "hidden" if hidden else _unreadable(path)
        if reason is None and path.resolve() in seen:
            reason = "the same file under another name"
        if reason is None:
            seen.add(path.resolve())
            found.files.append(path)
        else:
            found.left_out.append((path, reason))
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, through links; each folder is searched once."""
    visited = {folder.resolve()}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        with os.scandir(current) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        for entry in inside:
            path = current / entry.name
            if not path.is_dir():  # DirEntry.is_dir() raises an error for a link to itself
                yield path
            elif path.resolve() not in visited:
                visited.add(path.resolve())
                waiting.append(path)


def _unreadable(path: Path) -> str | None:
    """Return the reason why a file in a folder cannot be read, or None if it can."""
    if not path.exists():
        return "a link to a file that does not exist"
    if not path.is_file():
        return "not a file"
    if not text_format(path):
        return "of an unknown kind"
    if path.stat().st_size == 0:
        return "empty"
    if is_git_lfs_pointer(path):
        return "a pointer of Git LFS, which git lfs pull fetches"
    return None

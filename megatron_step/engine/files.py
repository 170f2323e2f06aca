"""Files that are there whole or not at all."""

import os
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write a text file under a temporary name beside `path`, and rename it: a crash leaves the old file or the new.

    Raises OSError if the folder is missing or cannot be written; the temporary file is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise

"""A file is written whole, or the old one stays."""

from pathlib import Path

import pytest
from file_size_limit import file_size_limit

from megatron_step.engine.files import atomic_write


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("old", "new ø"):
        atomic_write(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    with file_size_limit(5), pytest.raises(OSError, match="File too large"):
        atomic_write(path, "new, and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

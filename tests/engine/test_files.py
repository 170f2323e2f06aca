"""A file is written whole, or the old one stays."""

import os
from pathlib import Path

import pytest
from file_size_limit import file_size_limit

from megatron_step.engine.files import atomic_write, is_git_lfs_pointer, whole_file


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("old", "new ø", b"\x00\xff"):
        atomic_write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_hosts_that_share_a_folder_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of two hosts can have the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "file"
    with whole_file(path) as one:
        one.write_text("one")
        atomic_write(path, "other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    with file_size_limit(5), pytest.raises(OSError, match="File too large"):
        atomic_write(path, "new, and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half of the new")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        atomic_write(tmp_path / "nowhere/file", "text")


def test_a_pointer_of_git_lfs_is_known_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, expected in ((b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", True), (b"ver", False)):
        path.write_bytes(content)
        assert is_git_lfs_pointer(path) is expected

"""All text of a folder is read, and what is not is named."""

import os
from pathlib import Path

import pytest

from megatron_step.data.text_files import find_text_files, text_format


def test_formats() -> None:
    names = {
        ".txt": ["a.txt", "a.TXT", "a.txt.gz", "a.Txt.XZ", "a.txt.bz2"],
        ".jsonl": ["a.jsonl", "a.b.jsonl.zst", "a.ndjson", "A.JSONL.GZ"],
        ".json": ["a.json", "a.json.gz"],
        ".parquet": ["a.parquet", "a.PARQUET"],
        None: ["a.parquet.gz", "a.gz", "a", ".txt", "a.md", "a.tar.gz"],
    }
    for form, written in names.items():
        assert [text_format(Path(name)) for name in written] == [form] * len(written)


def _make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    _make(tmp_path, "b.txt", "a/z.jsonl", "a/b/c.txt.gz", "a/C.JSON")
    found = find_text_files([tmp_path / "b.txt", tmp_path / "a"])
    assert [str(path.relative_to(tmp_path)) for path in found.files] == [
        "b.txt",
        "a/C.JSON",
        "a/b/c.txt.gz",
        "a/z.jsonl",
    ]
    assert found.left_out == found.report == []


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    _make(tmp_path, "in/a.txt", "disk2/b.txt", "disk3/c.txt")
    for name, target in {"shard": "../disk2", "file.txt": "../disk3/c.txt", "twice.txt": "a.txt", "loop": "."}.items():
        os.symlink(target, tmp_path / "in" / name)
    os.symlink("../in", tmp_path / "disk2" / "back")
    os.symlink("../disk2", tmp_path / "in" / "shard_again")
    found = find_text_files([tmp_path / "in"])
    assert [path.name for path in found.files] == ["a.txt", "file.txt", "b.txt"]
    assert [(path.name, reason) for path, reason in found.left_out] == [
        ("twice.txt", "the same file under another name")
    ]


def test_hidden_files_are_left_out_and_a_hidden_folder_may_be_named(tmp_path: Path) -> None:
    _make(tmp_path, ".cache/a.txt", ".cache/._a.txt", ".cache/.git/b.txt", ".cache/.ipynb_checkpoints/a.txt")
    found = find_text_files([tmp_path / ".cache"])
    assert [path.name for path in found.files] == ["a.txt"]
    assert [reason for _, reason in found.left_out] == ["hidden"] * 3


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    _make(tmp_path, "a.txt", "readme.md", "deep/data.csv", "old.tar.gz")
    (tmp_path / "lfs.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.jsonl").touch()
    os.symlink("nowhere", tmp_path / "gone.txt")
    os.symlink("itself.txt", tmp_path / "itself.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="pipe.txt is not a regular file"):
        find_text_files([tmp_path / "pipe.txt"])
    found = find_text_files([tmp_path])
    assert [path.name for path in found.files] == ["a.txt"]
    report = "\n".join(found.report)
    assert report.startswith("left out 8 entries in the folders of the input: ")
    for words in ("3 of an unknown kind", "1 empty", "2 a link to a file that does not exist", "1 not a file"):
        assert words in report
    for name in ("readme.md", "deep/data.csv", "old.tar.gz", "empty.jsonl", "gone.txt", "pipe.txt"):
        assert f"{name}: " in report
    _make(tmp_path, *(f"more/{number}.md" for number in range(100)))
    report = "\n".join(find_text_files([tmp_path]).report)
    assert "left out 108 entries" in report and report.endswith("and 88 more")


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, "no input given"),
        (["missing.txt"], FileNotFoundError, r"the input .*missing\.txt does not exist"),
        (["a.md"], ValueError, r"a\.md is a file of an unknown kind: text is read from \.txt"),
        (["empty.txt"], ValueError, r"empty\.txt is empty"),
        (["pointer.txt"], ValueError, "pointer.txt is a pointer of Git LFS.*git lfs pull"),
        (["folder"], ValueError, "the folder .*folder holds no text file.*left out 1 .*b.md: of an unknown kind"),
        (["a.txt", "."], ValueError, r"names .*a\.txt twice"),
    ],
)
def test_bad_inputs(tmp_path: Path, inputs: list[str], error: type[Exception], message: str) -> None:
    _make(tmp_path, "a.md", "a.txt", "folder/b.md")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(error, match=message):
        find_text_files([tmp_path / name for name in inputs])

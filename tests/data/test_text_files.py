import gzip
from pathlib import Path

import pytest
import zstandard

from megatron_step.data.text_files import list_text_files, open_bytes, text_format

CONTENT = b"some text, again and again\n" * 20_000


def read(path: Path) -> bytes:
    with open_bytes(path) as (stream, _):
        return b"".join(iter(lambda: stream.read(1000), b""))


def test_formats() -> None:
    names = ["a.txt", "a.txt.gz", "a.jsonl", "a.b.jsonl.zst", "a.parquet", "a.parquet.gz", "a.json", "a.gz", "a"]
    expected = [".txt", ".txt", ".jsonl", ".jsonl", ".parquet", None, None, None, None]
    assert [text_format(Path(name)) for name in names] == expected


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/b/c.txt.gz", "readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [str(path.relative_to(tmp_path)) for path in list_text_files([tmp_path / "b.txt", tmp_path / "a"])]
    assert found == ["b.txt", "a/b/c.txt.gz", "a/z.jsonl"]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, "no input given"),
        (["missing.txt"], FileNotFoundError, r"no such file or folder: .*missing\.txt"),
        (["a.json"], ValueError, r"a\.json: unknown kind of file"),
        (["empty.txt"], ValueError, r"empty\.txt is empty"),
        (["folder"], ValueError, "the folder .*folder holds no"),
        (["a.txt", "."], ValueError, r"names .*a\.txt twice"),
    ],
)
def test_bad_inputs(tmp_path: Path, inputs: list[str], error: type[Exception], message: str) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in {"a.json": b"x", "a.txt": b"x", "empty.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        list_text_files([tmp_path / name for name in inputs])


def test_compressed_files_give_the_content(tmp_path: Path) -> None:
    half = len(CONTENT) // 2
    frames = zstandard.compress(CONTENT[:half]) + zstandard.compress(b"") + zstandard.compress(CONTENT[half:])
    members = gzip.compress(CONTENT[:half]) + gzip.compress(CONTENT[half:])
    for name, content in {"a.txt": CONTENT, "a.txt.gz": members, "a.txt.zst": frames}.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == CONTENT


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_or_damaged_compression(tmp_path: Path, suffix: str) -> None:
    import random

    content = random.Random(1).randbytes(200_000)
    whole = (
        gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    )
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"no compressed data at all", bytes(damaged)):
        path = tmp_path / f"a.txt.{suffix}"
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.txt\.\w+ is damaged or incomplete"):
            read(path)

"""Compressed and re-encoded files give the bytes of their text."""

import bz2
import gzip
import lzma
import random
from pathlib import Path

import pytest
import zstandard

from megatron_step.data.text_streams import as_utf8, open_bytes

CONTENT = b"some text, again and again\n" * 20_000
_COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}


def read(path: Path) -> bytes:
    with open_bytes(path) as (stream, _):
        return b"".join(iter(lambda: stream.read(1000), b""))


def read_text(path: Path) -> bytes:
    with open_bytes(path) as (stream, _):
        return as_utf8(path, stream).read()


@pytest.mark.parametrize("suffix", _COMPRESS)
def test_compressed_files_of_several_parts_give_the_content(tmp_path: Path, suffix: str) -> None:
    compress, half = _COMPRESS[suffix], len(CONTENT) // 2
    path = tmp_path / f"a.TXT.{suffix.upper()}"
    path.write_bytes(compress(CONTENT[:half]) + compress(b"") + compress(CONTENT[half:]))
    assert read(path) == read_text(path) == CONTENT
    path.write_bytes(compress(b""))
    assert read(path) == read_text(path) == b""


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zst_with_a_long_window(tmp_path: Path, window_log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, compression_level=1)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"  # as pzstd writes
    (tmp_path / "a.txt.zst").write_bytes(skippable + frame.compress(CONTENT) + frame.flush() + skippable)
    assert read(tmp_path / "a.txt.zst") == CONTENT


@pytest.mark.parametrize("suffix", _COMPRESS)
def test_truncated_or_damaged_compression(tmp_path: Path, suffix: str) -> None:
    content = random.Random(1).randbytes(200_000)
    compress = zstandard.ZstdCompressor(write_checksum=True).compress if suffix == "zst" else _COMPRESS[suffix]
    whole = compress(content)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"no compressed data at all", bytes(damaged)):
        path = tmp_path / f"a.txt.{suffix}"
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.txt\.\w+ is damaged or incomplete"):
            read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, encoding: str) -> None:
    text = "é木😀 words\r\n" * 30_000
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert read_text(path).decode() == text
    path.write_bytes(text.encode(encoding)[:-1])
    with pytest.raises(ValueError, match=r"a\.txt has the byte order mark of UTF-\d\d, but is not valid"):
        read_text(path)


def test_utf16_without_a_mark_is_refused_and_a_few_zeros_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("plain words".encode("utf-16-le"))
    with pytest.raises(ValueError, match="as in UTF-16 without a byte order mark. Convert"):
        read_text(path)
    path.write_bytes(b"NUL \0 inside\0")
    assert read_text(path) == b"NUL \0 inside\0"
    path.write_bytes(b"\xef\xbb\xbftext")
    assert read_text(path) == b"\xef\xbb\xbftext"

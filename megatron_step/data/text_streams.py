"""Read text files as streams of bytes: decompressed, and converted from UTF-16 or UTF-32 to UTF-8."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_BLOCK_BYTES = 1 << 16
_LONGEST_WINDOW_BYTES = 1 << 31
"""Bytes of zstd's longest window (--long=31); the library's default limit is 2^27."""
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Encodings by byte order mark; UTF-32 comes first, since its mark begins with UTF-16's."""


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BinaryIO, IO[bytes]]]:
    """Open a file, and give its decompressed bytes and the raw file, whose `tell()` is the number of bytes read.

    Raises ValueError, also from later reads, if a compressed file is damaged or truncated.
    """
    with path.open("rb") as raw:
        try:
            yield _decompressed(path.suffix.lower(), raw), raw
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}): get a complete copy") from error
        except OSError as error:
            if error.errno is not None:
                raise
            # gzip and bz2 raise an OSError without errno for damaged data.
            raise ValueError(f"{path} is damaged or incomplete ({error}): get a complete copy") from error


def as_utf8(path: Path, stream: BinaryIO) -> BinaryIO:
    """Return a stream in UTF-8 if a byte order mark says UTF-16 or UTF-32, else the same bytes.

    `peek()` of the returned stream gives the first 64 KiB.

    Raises ValueError, also from later reads, for UTF-16 that is damaged or lacks a byte order mark.
    """
    start = stream.read(_BLOCK_BYTES)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if encoding is None and start.count(0) >= max(8, len(start) // 4):
        raise ValueError(
            f"{path} is not UTF-8 text: many of its bytes are zero, as in UTF-16 without a byte order mark. Convert "
            "the file, for example with iconv -f UTF-16LE -t UTF-8"
        )
    return io.BufferedReader(_Text(path, start, stream, encoding), buffer_size=_BLOCK_BYTES)


def _decompressed(suffix: str, raw: BinaryIO) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.BZ2File(raw)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.LZMAFile(raw)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdStream(raw), buffer_size=1 << 20) if suffix == ".zst" else raw


class _ReadyBytes(io.RawIOBase):
    """A stream whose subclass supplies its bytes block by block."""

    def __init__(self) -> None:
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._ready:
            if not self._fill():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        """Make the next block ready; return False at the end of the file."""
        raise AssertionError("a subclass must define _fill")


class _Text(_ReadyBytes):
    """The bytes `start` and the rest of `stream`, converted to UTF-8."""

    def __init__(self, path: Path, start: bytes, stream: BinaryIO, encoding: str | None) -> None:
        super().__init__()
        self._path, self._start, self._stream, self._encoding = path, start, stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)() if encoding is not None else None
        self._ended = False

    def _fill(self) -> bool:
        if self._ended:
            return False
        block, self._start = self._start or self._stream.read(_BLOCK_BYTES), b""
        self._ended = not block
        try:
            if self._decoder is not None:
                block = self._decoder.decode(block, final=self._ended).encode("utf-8")
        except UnicodeError as error:
            raise ValueError(
                f"{self._path} has the byte order mark of {self._encoding}, but is not valid {self._encoding}: {error}"
            ) from error
        self._ready = memoryview(block)
        return True


class _ZstdStream(_ReadyBytes):
    """The decompressed bytes of a .zst file with any number of frames.

    Raises EOFError if the file ends inside a frame; the library's stream reader does not notice that.
    """

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__()
        self._raw = raw
        self._compressed = b""
        self._frame: Any = None

    def _fill(self) -> bool:
        import zstandard

        self._compressed = self._compressed or self._raw.read(_BLOCK_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        decompressor = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW_BYTES)
        self._frame = self._frame or decompressor.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(self._compressed))
        except zstandard.ZstdError as error:
            raise EOFError(f"not valid zstd data: {error}") from error
        ended = self._frame.eof
        self._compressed = self._frame.unused_data if ended else b""
        self._frame = None if ended else self._frame
        return True

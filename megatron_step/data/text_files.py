"""Which files hold text, and their bytes as a stream, compressed or not."""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_COMPRESSED_SUFFIXES = (".gz", ".zst")
_ZSTD_BLOCK_BYTES = 1 << 16


def text_format(path: Path) -> str | None:
    """`.txt`, `.jsonl` or `.parquet`, whatever the compression; None for any other file."""
    compressed = path.suffix in _COMPRESSED_SUFFIXES
    suffix = path.with_suffix("").suffix if compressed else path.suffix
    return suffix if suffix in TEXT_SUFFIXES and not (compressed and suffix == ".parquet") else None


def list_text_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The text files that `inputs` name: files as given, folders as all text files below them, sorted by path.

    Raises FileNotFoundError for a path that does not exist, and ValueError for a file of an unknown kind, an empty one,
    one named twice, or where there is no text file at all.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"no such file or folder: {given}")
        if given.is_dir():
            inside = sorted(path for path in given.rglob("*") if path.is_file() and text_format(path))
            if not inside:
                raise ValueError(f"the folder {given} holds no .txt, .jsonl(.gz, .zst) or .parquet file")
            files += inside
        elif text_format(given):
            files.append(given)
        else:
            raise ValueError(f"{given}: unknown kind of file; text is read from .txt, .jsonl(.gz, .zst) and .parquet")
    if not files:
        raise ValueError("no input given: name at least one text file or folder")
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"the input names {file} twice: give each file once")
        seen.add(file.resolve())
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty: remove it from the input, or fill it")
    return files


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BinaryIO, IO[bytes]]]:
    """Open a file and give its decompressed bytes and the raw file, whose `tell()` says how far reading has come.

    Raises ValueError, from the reads as well, where a compressed file is damaged or ends too early.
    """
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            stream: BinaryIO = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
        elif path.suffix == ".zst":
            stream = io.BufferedReader(_ZstdStream(raw), buffer_size=1 << 20)
        else:
            stream = raw
        try:
            yield stream, raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}") from error


class _ZstdStream(io.RawIOBase):
    """The decompressed bytes of a .zst file of any number of frames.

    The library's own stream reader takes a file that stops inside a frame for a complete one; this one raises EOFError.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._compressed = b""
        self._frame: Any = None
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
        """Decompress the next block; False at the end of the file."""
        import zstandard

        self._compressed = self._compressed or self._raw.read(_ZSTD_BLOCK_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(self._compressed))
        except zstandard.ZstdError as error:
            raise EOFError(f"not valid zstd data: {error}") from error
        ended = self._frame.eof
        self._compressed = self._frame.unused_data if ended else b""
        self._frame = None if ended else self._frame
        return True

"""Read documents from .txt, .jsonl, .json and .parquet files, as a stream of pieces that needs little memory."""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_step.config.yaml_json import parse_json
from megatron_step.data.json_values import holds_lines, json_values
from megatron_step.data.parquet_column import text_column, values_in_bytes
from megatron_step.data.pieces import Piece, split_documents, split_record
from megatron_step.data.text_files import text_format
from megatron_step.data.text_streams import as_utf8, open_bytes

_BLOCK_BYTES = 1 << 20
_MAX_RECORD_BYTES = 1 << 28
_PARQUET_ROWS = 256
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # the error handler "surrogateescape" turns invalid bytes into these


class _Unusable(Exception):
    """Error for an unusable text: the reason to count it under, the place, and a message that says what is wrong."""

    def __init__(self, reason: str, place: str, message: str) -> None:
        super().__init__(f"{place}: {message}; correct the text, or skip such text with --skip-invalid")
        self.reason = reason


class DocumentReader:
    """An iterator over the pieces of all documents in the files, in order, that counts the records it skips.

    A .txt file is one document, or several with `separator`. In .jsonl and .json each object is a document, with its
    text under `key`. In .parquet each row is a document, with its text in the column `key`.

    Iterating raises ValueError, with the file and the place, for invalid UTF-8, for a record without text, and for a
    line that is not a JSON object. With `skip_invalid` such records (in .txt: lines with invalid UTF-8) are skipped and
    counted in `skipped`.
    """

    def __init__(
        self, files: Sequence[Path], key: str = "text", separator: str | None = None, skip_invalid: bool = False
    ) -> None:
        self.files = list(files)
        self.key = key
        self.separator = separator
        self.skip_invalid = skip_invalid
        self.skipped: dict[str, int] = {}
        self._finished_bytes = 0
        self._position: Callable[[], int] = int

    @property
    def bytes_read(self) -> int:
        """Bytes read so far; compressed files count by their size on disk."""
        return self._finished_bytes + self._position()

    def __iter__(self) -> Iterator[Piece]:
        readers = {
            ".txt": self._read_text,
            ".jsonl": self._read_json_lines,
            ".json": self._read_json,
            ".parquet": self._read_parquet,
        }
        for path in self.files:
            with open_bytes(path) as (stream, raw):
                self._position = raw.tell
                form = str(text_format(path))
                text = stream if form == ".parquet" else as_utf8(path, stream)
                yield from readers[form](path, text)
                self._position = int
            self._finished_bytes += path.stat().st_size

    def _skip(self, unusable: _Unusable) -> None:
        if not self.skip_invalid:
            raise ValueError(str(unusable)) from unusable.__cause__
        self.skipped[unusable.reason] = self.skipped.get(unusable.reason, 0) + 1

    def _read_text(self, path: Path, stream: BinaryIO) -> Iterator[Piece]:
        blocks = self._valid_lines(path, stream) if self.skip_invalid else _valid_blocks(path, stream)
        empty = True
        try:
            for piece in split_documents(blocks, self.separator):
                empty = False
                yield piece
            if empty:
                raise _Unusable("empty text", str(path), "the file has no text")
        except _Unusable as unusable:
            self._skip(unusable)

    def _valid_lines(self, path: Path, stream: BinaryIO) -> Iterator[str]:
        """Yield a .txt file's text without lines that hold invalid UTF-8; a line longer than a block counts as two."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        rest, first = "", True
        while block := stream.read(_BLOCK_BYTES):
            rest += decoder.decode(block)
            rest, first = (rest.removeprefix("\ufeff") if first else rest), False
            cut = rest.rfind("\n") + 1 or (len(rest) if len(rest) > _BLOCK_BYTES else 0)
            yield self._without_undecodable(path, rest[:cut])
            rest = rest[cut:]
        yield self._without_undecodable(path, rest + decoder.decode(b"", final=True))

    def _without_undecodable(self, path: Path, text: str) -> str:
        if not _UNDECODABLE.search(text):
            return text
        lines = re.findall(r"[^\n]*\n|[^\n]+$", text)
        valid = [line for line in lines if not _UNDECODABLE.search(line)]
        for _ in range(len(lines) - len(valid)):
            self._skip(_Unusable("invalid UTF-8", str(path), "invalid UTF-8"))
        return "".join(valid)

    def _read_json_lines(self, path: Path, stream: BinaryIO) -> Iterator[Piece]:
        number = 0
        while line := stream.readline(_MAX_RECORD_BYTES + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > _MAX_RECORD_BYTES:
                raise ValueError(
                    f"{place}: the line is longer than {_MAX_RECORD_BYTES >> 20} MiB: write one JSON object per line, "
                    "or name the file .json if it holds one JSON array"
                )
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield from self._record(partial(_line_text, place, line, self.key))

    def _read_json(self, path: Path, stream: BinaryIO) -> Iterator[Piece]:
        if holds_lines(stream.peek()):  # type: ignore[attr-defined]
            yield from self._read_json_lines(path, stream)
            return
        values, number = json_values(stream, _MAX_RECORD_BYTES), 0
        while True:
            try:
                found = next(values, None)
            except ValueError as error:
                fault = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else f"not valid JSON ({error})"
                raise ValueError(f"{path}, after element {number}: {fault}; correct the file") from error
            if found is None:
                return
            number += 1
            yield from self._record(partial(_record_text, f"{path}, element {number}", *found, self.key))

    def _read_parquet(self, path: Path, stream: BinaryIO) -> Iterator[Piece]:
        import pyarrow
        import pyarrow.parquet

        size, row = path.stat().st_size, 0
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            self._position = lambda: size * row // max(1, file.metadata.num_rows)
            text_column(path, file.schema_arrow, self.key)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.key], use_threads=False):
                for value in values_in_bytes(batch.column(0)):
                    place = f"{path}, row {row}"
                    yield from self._record(partial(_parquet_text, place, value))
                    row += 1
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a parquet file, or is damaged ({reason}): write the file again") from error

    def _record(self, read_text: Callable[[], str]) -> Iterator[Piece]:
        try:
            text = read_text()
        except _Unusable as unusable:
            self._skip(unusable)
        else:
            yield from split_record(text)


def _valid_blocks(path: Path, stream: BinaryIO) -> Iterator[str]:
    """Yield a .txt file's text; raise _Unusable at the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # position of the first byte that is not yet decoded
    while True:
        block = stream.read(_BLOCK_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = f"{path}, byte {offset + error.start}"
            raise _Unusable("invalid UTF-8", place, "invalid UTF-8") from error
        yield text.removeprefix("\ufeff") if offset == 0 else text
        if not block:
            return
        offset += len(text.encode())


def _line_text(place: str, line: bytes, key: str) -> str:
    """Return the text of a line of .jsonl."""
    try:
        text = line.decode("utf-8")
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise _Unusable("invalid UTF-8", f"{place}, byte {error.start} of the line", "invalid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable("invalid JSON", place, f"not valid JSON ({error})") from error
    return _record_text(place, record, text, key)


def _record_text(place: str, record: Any, text: str, key: str) -> str:
    """Return a record's text under `key`; `text` is the record as the file holds it."""
    if not isinstance(record, dict):
        raise _Unusable("invalid JSON", place, f"the record is a {type(record).__name__}, not a JSON object")
    if key not in record:
        keys = ", ".join(list(record)[:8]) or "none"
        raise _Unusable("missing text", place, f"there is no key '{key}' (keys: {keys}): choose one with --key")
    if text.count(f'"{key}"') > 1:  # perhaps the key is given twice: the parser would keep the last value only
        try:
            parse_json(text)
        except ValueError as error:
            raise _Unusable("invalid JSON", place, str(error)) from error
    return _usable(place, record[key])


def _parquet_text(place: str, value: bytes | None) -> str:
    """Return the text of a row of .parquet."""
    try:
        return _usable(place, None if value is None else value.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unusable("invalid UTF-8", f"{place}, byte {error.start} of the text", "invalid UTF-8") from error


def _usable(place: str, text: Any) -> str:
    """Return a record's text if it is a string that is not blank and can be encoded; else raise _Unusable."""
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise _Unusable("missing text", place, f"the text is {found}, not a string")
    if not text.strip():
        raise _Unusable("empty text", place, "the text is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's escapes allow half a surrogate pair
        raise _Unusable("invalid UTF-8", place, "the text holds one half of a surrogate pair") from error
    return text

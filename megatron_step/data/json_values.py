"""Read the records of a .json file: one object per line, one array of objects, or one object over several lines."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

_BLOCK_BYTES = 1 << 16
_BLANK = re.compile(r"[ \t\r\n]*")


class Value(NamedTuple):
    """A JSON value."""

    value: Any
    """The value in Python."""
    text: str
    """The value's text in the file."""


def holds_lines(start: bytes) -> bool:
    """Return whether a .json file that begins with `start` holds one object per line: its first line is an object."""
    first_line, line_feed, _ = start.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    return not first_line.startswith(b"[") and (not line_feed or first_line.rstrip().endswith(b"}"))


def json_values(stream: BinaryIO, longest: int) -> Iterator[Value]:
    """Yield the elements of an array, or the one value, in a stream of UTF-8; nothing for white space alone.

    An element may have up to about `longest` characters, and memory holds one element at a time.

    Raises ValueError if the text is not JSON, and UnicodeDecodeError, a ValueError, if it is not UTF-8.
    """
    reader = _Reader(stream, longest)
    follows = reader.next_character()
    if follows not in ("", "["):
        yield reader.value()
    elif follows == "[":
        reader.skip_character()
        follows = reader.next_character()
        while follows != "]":
            reader.next_character()
            yield reader.value()
            follows = reader.next_character()
            if follows == ",":
                reader.skip_character()
            elif follows != "]":
                raise ValueError("the array has no end" if follows == "" else f"expected ',' or ']', found {follows!r}")
        reader.skip_character()
    if reader.next_character() != "":
        raise ValueError("text follows the end of the JSON value: name a file with one object per line .jsonl")


class _Reader:
    """A parser of a stream that keeps only as much text in memory as a value needs."""

    def __init__(self, stream: BinaryIO, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder()
        self._text, self._position, self._ended = "", 0, False

    def next_character(self) -> str:
        """Skip white space and return the next character, or "" at the end."""
        while True:
            match = _BLANK.match(self._text, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read_more()

    def skip_character(self) -> None:
        """Move past one character."""
        self._position += 1

    def value(self) -> Value:
        """Parse the next value, reading twice as much text whenever the value's end is not yet in memory.

        Raises ValueError if the text is not JSON, or if the value is too long.
        """
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._position)
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            except ValueError:
                if self._ended:
                    raise
            else:
                if end < len(self._text) or self._ended:  # else a number may continue in the next block
                    text = self._text[self._position : end]
                    self._position = end
                    return Value(value, text)
            if len(self._text) - self._position > self._longest:
                raise ValueError(f"a value is longer than {self._longest >> 20} MiB")
            self._read_more()

    def _read_more(self) -> None:
        self._text = self._text[self._position :]
        self._position = 0
        block = self._stream.read(max(_BLOCK_BYTES, len(self._text)))
        self._ended = not block
        self._text += self._decoder.decode(block, final=self._ended)

"""The records of a .json file: lines with one object each, one array of objects, or one object over several lines."""

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
    text: str
    """As it stands in the file."""


def holds_lines(start: bytes) -> bool:
    """Whether a .json file that begins with `start` holds an object a line: its first line begins and ends one."""
    first_line, line_feed, _ = start.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    return not first_line.startswith(b"[") and (not line_feed or first_line.rstrip().endswith(b"}"))


def json_values(stream: BinaryIO, longest: int) -> Iterator[Value]:
    """The elements of the array, or the one value, that a stream of UTF-8 holds; nothing for a file of white space.

    Elements pass one by one through a memory of about `longest` characters, the most that one may have.

    Raises ValueError where the text is not JSON, and UnicodeDecodeError, a ValueError, where it is not UTF-8.
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
                raise ValueError("the array has no end" if follows == "" else f"',' or ']' is due, not {follows!r}")
        reader.skip_character()
    if reader.next_character() != "":
        raise ValueError("more text follows the end of the JSON value: objects in lines belong in a .jsonl file")


class _Reader:
    """The text of a stream, of which as much is in memory as a value needs."""

    def __init__(self, stream: BinaryIO, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder()
        self._text, self._position, self._ended = "", 0, False

    def next_character(self) -> str:
        """The character that follows white space; nothing at the end."""
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
        """Go one character on."""
        self._position += 1

    def value(self) -> Value:
        """The value that follows; with each try that finds no end, twice as much text is read."""
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._position)
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            except ValueError:
                if self._ended:
                    raise
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    text = self._text[self._position : end]
                    self._position = end
                    return Value(value, text)
            if len(self._text) - self._position > self._longest:
                raise ValueError(f"a value of more than {self._longest >> 20} MiB")
            self._read_more()

    def _read_more(self) -> None:
        self._text = self._text[self._position :]
        self._position = 0
        block = self._stream.read(max(_BLOCK_BYTES, len(self._text)))
        self._ended = not block
        self._text += self._decoder.decode(block, final=self._ended)

"""Documents as pieces of bounded size, so that one document of any length passes through a small, fixed memory.

A document is tokenized piece by piece and its tokens are joined; the end-of-document token follows the last piece.
Pieces are a function of the document's text alone: the same text gives the same pieces from any kind of file.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE_CHARACTERS = 1 << 16
"""Longest piece. SentencePiece's BPE gets slower with the length of a text: 3x at a million characters."""


class Piece(NamedTuple):
    """A part of a document, in order."""

    text: str
    ends_document: bool


def split_record(text: str) -> Iterator[Piece]:
    """The pieces of a document that is wholly in memory."""
    return _close_document(text)


def split_documents(blocks: Iterable[str], separator: str | None) -> Iterator[Piece]:
    """The pieces of the documents in a stream of text of any length.

    Without `separator` the whole stream is one document. With it, documents lie between its occurrences, and are left
    out where they hold nothing but white space; a separator of n line feeds also matches more than n, and each line
    feed also matches CR LF.
    """
    pattern = _separator_pattern(separator) if separator else None
    hold = 2 * len(separator) if separator else 0  # a separator may begin here and end in the next block
    rest, begun = "", False
    for block in blocks:
        rest += block
        start = 0
        for match in pattern.finditer(rest) if pattern else ():
            yield from _close_document(rest[start : match.start()], begun)
            start, begun = match.end(), False
        ends_in_separator = start > 0 and rest[start:] in ("", "\r")
        # The separator may go on in the next block, so one stays, to grow there.
        rest = (separator or "") + rest[start:] if ends_in_separator else rest[start:]
        while len(rest) > PIECE_CHARACTERS + hold:
            cut = _cut(rest)
            yield Piece(rest[:cut], False)
            rest, begun = rest[cut:], True
    if pattern and pattern.match(rest):
        return
    yield from _close_document(rest, begun)


def _close_document(text: str, begun: bool = False) -> Iterator[Piece]:
    """The last pieces of a document; nothing for one of white space only, of which no piece has been given yet."""
    if not begun and not text.strip():
        return
    while len(text) > PIECE_CHARACTERS:
        cut = _cut(text)
        yield Piece(text[:cut], False)
        text = text[cut:]
    yield Piece(text, True)


def _cut(text: str) -> int:
    """Where the first piece of a text longer than a piece ends: behind a line feed, else before spaces, else anywhere.

    The line feed is followed by no further white space, because tokenizers join runs of it into one token.
    """
    end = PIECE_CHARACTERS
    while (line_feed := text.rfind("\n", 0, end)) >= 0:
        if not text[line_feed + 1].isspace():
            return line_feed + 1
        end = line_feed
    space = text.rfind(" ", 0, PIECE_CHARACTERS)
    return len(text[: space + 1].rstrip(" ")) or PIECE_CHARACTERS


def _separator_pattern(separator: str) -> re.Pattern[str]:
    line_feeds_only = not separator.strip("\n")
    if line_feeds_only:
        return re.compile(rf"(?:\r?\n){{{len(separator)},}}")
    return re.compile(re.escape(separator).replace("\\\n", r"\r?\n"))

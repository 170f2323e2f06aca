"""Split documents into pieces of bounded size, so that a document of any length needs little memory.

A document is tokenized piece by piece, and an end-of-document token follows its last piece. Pieces depend on the
document's text only: the same text gives the same pieces from any kind of file.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE_CHARACTERS = 1 << 16
"""Characters of the longest piece. SentencePiece's BPE is slower on long texts: 3x at a million characters."""


class Piece(NamedTuple):
    """A piece of a document; pieces come in order."""

    text: str
    """The piece's text."""
    ends_document: bool
    """Whether the piece is the last of its document."""


def split_record(text: str) -> Iterator[Piece]:
    """Yield the pieces of a document that is whole in memory."""
    return _close_document(text)


def split_documents(blocks: Iterable[str], separator: str | None) -> Iterator[Piece]:
    """Yield the pieces of the documents in a stream of text of any length.

    Without `separator` the whole stream is one document. With a separator, documents lie between its occurrences, and
    documents of white space alone are skipped. A separator of n line feeds also matches more than n, and each line feed
    also matches CR LF.
    """
    pattern = _separator_pattern(separator) if separator else None
    hold = 2 * len(separator) if separator else 0  # characters kept, since a separator may end in the next block
    rest, begun = "", False
    for block in blocks:
        rest += block
        start = 0
        for match in pattern.finditer(rest) if pattern else ():
            yield from _close_document(rest[start : match.start()], begun)
            start, begun = match.end(), False
        ends_in_separator = start > 0 and rest[start:] in ("", "\r")
        # The separator may continue in the next block, so one stays at the front of the rest.
        rest = (separator or "") + rest[start:] if ends_in_separator else rest[start:]
        while len(rest) > PIECE_CHARACTERS + hold:
            cut = _cut(rest)
            yield Piece(rest[:cut], False)
            rest, begun = rest[cut:], True
    if pattern and pattern.match(rest):
        return
    yield from _close_document(rest, begun)


def _close_document(text: str, begun: bool = False) -> Iterator[Piece]:
    """Yield the last pieces of a document; nothing for a document of white space alone."""
    if not begun and not text.strip():
        return
    while len(text) > PIECE_CHARACTERS:
        cut = _cut(text)
        yield Piece(text[:cut], False)
        text = text[cut:]
    yield Piece(text, True)


def _cut(text: str) -> int:
    """Position at which to cut a text that is too long: after a line feed, else before spaces, else at the limit.

    No white space follows that line feed, because tokenizers merge runs of white space into one token.
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

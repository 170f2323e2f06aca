from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.data import pieces
from megatron_step.data.pieces import PIECE_CHARACTERS, Piece, split_documents, split_record


def in_blocks(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def documents(parts: list[Piece]) -> list[str]:
    whole, current = [], ""
    for piece in parts:
        current += piece.text
        if piece.ends_document:
            whole.append(current)
            current = ""
    assert current == ""
    return whole


def test_short_stream_is_one_piece() -> None:
    assert list(split_documents(["a\n\n", "b"], None)) == [Piece("a\n\nb", True)]
    assert list(split_documents(["x"], None)) == [Piece("x", True)]


@pytest.mark.parametrize("empty", [[], [""], [" \n"], ["\n", "\t"]])
def test_nothing_but_white_space_is_no_document(empty: list[str]) -> None:
    assert list(split_documents(empty, None)) == []
    assert list(split_documents(empty, "\n\n")) == []


def test_long_document_is_cut_behind_a_line_feed_or_before_spaces() -> None:
    line = "word " * 20 + "end\n\n  "
    parts = list(split_record(line * 5000))
    assert "".join(piece.text for piece in parts) == line * 5000
    assert len(parts) > 5 and max(len(piece.text) for piece in parts) <= PIECE_CHARACTERS
    assert [piece.ends_document for piece in parts] == [False] * (len(parts) - 1) + [True]
    assert all(piece.text.startswith(" ") for piece in parts[1:])
    lines = list(split_record("some words\n" * 50_000))
    assert all(piece.text.endswith("\n") and piece.text.startswith("some") for piece in lines)


def test_text_without_any_place_to_cut() -> None:
    parts = list(split_record("x" * (2 * PIECE_CHARACTERS + 1)))
    assert [len(piece.text) for piece in parts] == [PIECE_CHARACTERS, PIECE_CHARACTERS, 1]


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        ("\n\n", "a\nb\n\nc\n\n\n\n d\n", ["a\nb", "c", " d\n"]),
        ("\n\n", "\n\n\na\r\n\r\nb\r\n\r\n", ["a", "b"]),
        ("\n\n", "a\n \nb", ["a\n \nb"]),
        ("<|end|>", "a<|end|><|end|>b<|end", ["a", "b<|end"]),
        ("\n---\n", "a\r\n---\r\nb\n---\nc.*", ["a", "b", "c.*"]),
        (".*", "a.*b", ["a", "b"]),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_separators(separator: str, text: str, expected: list[str], block: int) -> None:
    assert documents(list(split_documents(in_blocks(text, block), separator))) == expected


@given(
    text=st.text("ab \n\r#", max_size=120),
    separator=st.sampled_from([None, "\n\n", "#", "a#", "\n"]),
    block=st.integers(1, 40),
    longest=st.integers(4, 20),
)
@settings(max_examples=500, deadline=None)
def test_pieces_depend_on_the_text_alone(text: str, separator: str | None, block: int, longest: int) -> None:
    # Also where a run of line feeds is longer than a piece.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARACTERS", longest)
        at_once = list(split_documents([text], separator))
        assert list(split_documents(in_blocks(text, block), separator)) == at_once
        if separator is None and text.strip():
            assert at_once == list(split_record(text))
            assert documents(at_once) == [text]

"""Values of a .json file come one by one, in a memory that the largest of them sets."""

import io
import json
import tracemalloc

import pytest

from megatron_step.data.json_values import holds_lines, json_values

_LONGEST = 1 << 28


def values(text: str | bytes, longest: int = _LONGEST) -> list:
    stream = io.BytesIO(text.encode() if isinstance(text, str) else text)
    return [value.value for value in json_values(stream, longest)]


@pytest.mark.parametrize(
    ("start", "lines"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', True),
        (b'\xef\xbb\xbf  {"text": "a"}', True),
        (b'{"text": "' + b"x" * 70_000, True),
        (b'{\n "text": "a"\n}', False),
        (b'[{"text": "a"}]', False),
        (b"\n [\n", False),
        (b"", True),
    ],
)
def test_lines_are_told_from_one_value(start: bytes, lines: bool) -> None:
    assert holds_lines(start) == lines


@pytest.mark.parametrize("indent", [None, 2])
def test_the_elements_of_an_array(indent: int | None) -> None:
    records = [{"text": "x" * size, "number": size} for size in (1, 70_000, 3, 200_000)] + [
        12345,
        None,
        "s",
        [1],
    ] * 9_000
    assert values(json.dumps(records, indent=indent)) == records
    assert values("\ufeff" + json.dumps(records)) == records


def test_other_values() -> None:
    assert values("") == values(" \n") == values("[]") == values(" [ ] ") == []
    assert values('{\n "text": "a"\n}\n') == [{"text": "a"}]
    assert [one.text for one in json_values(io.BytesIO(b'[ {"a" :1}, 2]'), _LONGEST)] == ['{"a" :1}', "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "the array has no end"),
        ("[1 2]", "expected ',' or ']', found '2'"),
        ("[1, ]", "Expecting value"),
        ('[{"a": 1}', "the array has no end"),
        ('[{"a": ', "Expecting value"),
        ("[1] 2", "text follows"),
        ('{"a": 1}\n{"a": 2}', "text follows .* name a file with one object per line .jsonl"),
        ("[" * 200_000, "nested too deeply"),
        (b'["\xff"]', "codec can't decode"),
        (b'["\xc3', "unexpected end of data"),
    ],
)
def test_text_that_is_not_json(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values(text)


def test_a_value_of_any_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a value is longer than 0 MiB"):
        values(json.dumps(["x" * 300_000]), longest=100_000)


def test_memory_is_that_of_the_largest_value() -> None:
    peaks = []
    for count in (1000, 8000):
        stream = io.BytesIO(json.dumps([{"text": "x" * 500}] * count).encode())
        tracemalloc.start()
        assert sum(1 for _ in json_values(stream, _LONGEST)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]

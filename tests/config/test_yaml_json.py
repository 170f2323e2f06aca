"""YAML and JSON are read strictly: a key that is given twice is an error, since one value would be lost."""

from pathlib import Path

import pytest

from megatron_step.config.yaml_json import parse_json, parse_yaml, read_json, read_yaml


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key a is given twice, in lines 1 and 3"),
        ("model: {x: 1}\nmodel:\n  y: 2\n", "the key model is given twice, in lines 1 and 2"),
        ("model: {x: 1, x: 1}\n", "the key x is given twice, in lines 1 and 1"),
        ("model:\n  deep:\n  - {x: 1,\n     'x': 2}\n", "the key x is given twice, in lines 3 and 4"),
        ("1: a\n1: b\n", "the key 1 is given twice"),
    ],
)
def test_a_yaml_key_given_twice_is_refused_with_both_lines(text: str, lines: str) -> None:
    with pytest.raises(ValueError, match=lines):
        parse_yaml(text)


def test_equal_keys_of_different_sections_and_merged_ones_are_no_doubles() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 1}\n") == {"a": {"x": 1}, "b": {"x": 1}}
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a}\n")["b"] == {"x": 3, "y": 2}


def test_a_date_is_text() -> None:
    assert parse_yaml("output_dir: 2026-01-31") == {"output_dir": "2026-01-31"}


def test_a_number_in_a_base_that_its_reader_does_not_expect_is_text() -> None:
    for text in ("010", "-007", "1:30", "1:30:00", "1:30.5"):
        assert parse_yaml(text) == text
    assert parse_yaml("[0, 10, -1, 0.5, 00.5, 1_000, 0x10, 1e3]") == [0, 10, -1, 0.5, 0.5, 1000, 16, "1e3"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_both_kinds_of_file_are_read_in_the_encodings_of_all_systems(
    tmp_path: Path, encoding: str, line_end: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(f"name: é{line_end}size: 2{line_end}".encode(encoding))
    assert read_yaml(path) == {"name": "é", "size": 2}
    path.write_bytes(f'{{"name": "é",{line_end} "size": 2}}'.encode(encoding))
    assert read_json(path) == {"name": "é", "size": 2}


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!timestamp 2026-13-45",
        "a: !!python/object:os.system {}",
        "? [a]\n: {}\n? {a: 1}\n: 2",
        "*unknown",
        "a: 1\n---\nb: 2",
        "\0",
        "[" * 3000,
        "a: " + "9" * 5000,
        b"\xff\xfe\xff",
        b"a: \xff",
    ],
)
def test_text_that_is_no_yaml_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="bad.yaml is not valid YAML: ") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_json_key_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"x": 1,\n "deep": [{"size": 1,\n  "size" : 2}]}')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: the key size .* twice .*lines 2, 3\)"):
        read_json(path)
    assert parse_json('{"a": {"x": 1}, "b": {"x": 2}}') == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1}}', "[" * 200_000, '{"a": ' + "9" * 5000 + "}", b"\xff\xfe\xff", b'"\xff"']
)
def test_text_that_is_no_json_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="bad.json is not valid JSON: ") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_a_file_that_cannot_be_read_is_an_error_of_the_system(tmp_path: Path, read: object) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")  # type: ignore[operator]

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_step.data.documents import DocumentReader


def read(*files: Path, **options: Any) -> list[str]:
    return whole_documents(DocumentReader(list(files), **options))


def whole_documents(reader: DocumentReader) -> list[str]:
    documents, current = [], ""
    for piece in reader:
        current += piece.text
        if piece.ends_document:
            documents.append(current)
            current = ""
    assert current == ""
    return documents


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file_is_a_document_byte_for_byte(tmp_path: Path) -> None:
    contents = ["x", "a\r\nb\r\n", "NUL \0 and \ufeff inside", "é木😀\n\n\nend", " lead"]
    files = [write(tmp_path / f"{index}.txt", content) for index, content in enumerate(contents)]
    assert read(*files) == contents
    assert read(write(tmp_path / "bom.txt", b"\xef\xbb\xbfa")) == ["a"]
    assert read(write(tmp_path / "p.txt", "a\n\nb\n\n\nc\n"), separator="\n\n") == ["a", "b", "c\n"]


def test_long_text_file(tmp_path: Path) -> None:
    content = "é木 words and words\n" * 150_000  # blocks end inside characters
    assert read(write(tmp_path / "a.txt", content)) == [content]
    assert read(write(tmp_path / "a.txt", content), skip_invalid=True) == [content]


def test_json_lines_in_all_compressions(tmp_path: Path) -> None:
    texts = ["one", "two\nlines", "é木😀", "x" * 200_000, '"quoted"', "\0"]
    content = ("\ufeff" + "\n\n".join(json.dumps({"id": 1, "text": text}) for text in texts)).encode()
    write(tmp_path / "a.jsonl", content)
    write(tmp_path / "a.jsonl.gz", gzip.compress(content))
    write(tmp_path / "a.jsonl.zst", zstandard.compress(content))
    write(tmp_path / "a.NDJSON.Bz2", bz2.compress(content))
    write(tmp_path / "a.json.xz", lzma.compress(content))
    write(tmp_path / "windows.jsonl", content.decode().replace("\n", "\r\n").encode("utf-16"))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.NDJSON.Bz2", "a.json.xz", "windows.jsonl"):
        assert read(tmp_path / name) == texts
    assert read(write(tmp_path / "k.jsonl", b'{"body": "b", "text": 1}\r\n'), key="body") == ["b"]


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    texts = [f"row {index} é" for index in range(1000)]
    table = pyarrow.table({"other": list(range(1000)), "body": pyarrow.array(texts, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    reader = DocumentReader([tmp_path / "a.parquet"], key="body")
    assert whole_documents(reader) == texts
    assert reader.bytes_read == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize(
    ("content", "message", "reason"),
    [
        (b'{"text": "a\xff"}', r"a\.jsonl:2, byte 11 of the line: invalid UTF-8", "invalid UTF-8"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: the text holds one half of a surrogate pair", "invalid UTF-8"),
        (b'{"text": "a"', r"a\.jsonl:2: not valid JSON", "invalid JSON"),
        (b"[" * 100_000, r"a\.jsonl:2: not valid JSON", "invalid JSON"),
        (b'["text"]', r"a\.jsonl:2: the record is a list, not a JSON object", "invalid JSON"),
        (b'{"content": "a"}', r"a\.jsonl:2: there is no key 'text' \(keys: content\)", "missing text"),
        (b'{"text": null}', r"a\.jsonl:2: the text is null, not a string", "missing text"),
        (b'{"text": 3}', r"a\.jsonl:2: the text is int, not a string", "missing text"),
        (b'{"text": "a", "text": "b"}', r"a\.jsonl:2: the key text is given twice", "invalid JSON"),
        (b'{"text": ""}', r"a\.jsonl:2: the text is empty", "empty text"),
        (b'{"text": " \\n"}', r"a\.jsonl:2: the text is empty", "empty text"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: bytes, message: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + content + b'\n{"text": "last"}\n')
    with pytest.raises(ValueError, match=message + ".*--skip-invalid"):
        read(path)
    reader = DocumentReader([path], skip_invalid=True)
    assert whole_documents(reader) == ["good", "last"]
    assert reader.skipped == {reason: 1}


def test_a_key_that_stands_twice_in_different_objects_is_no_double(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", b'{"text": "a", "meta": {"text": "b"}}')) == ["a"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_holds_one_array_or_one_object(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "a.json", json.dumps([{"text": "one"}, {"text": "two\nlines"}], indent=indent))
    assert read(path) == ["one", "two\nlines"]
    assert read(write(path, json.dumps({"text": "one"}, indent=indent))) == ["one"]
    assert read(write(path, " \n")) == []


def test_bad_elements_of_a_json_array(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([{"text": "one"}, 5, {"body": "b"}, {"text": "last"}]))
    with pytest.raises(ValueError, match=r"a\.json, element 2: the record is a int, not a JSON object.*--skip-invalid"):
        read(path)
    reader = DocumentReader([path], skip_invalid=True)
    assert whole_documents(reader) == ["one", "last"]
    assert reader.skipped == {"invalid JSON": 1, "missing text": 1}
    write(path, path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"a\.json, after element 3: not valid JSON"):
        read(path, skip_invalid=True)


@pytest.mark.parametrize("before", [0, 10, (1 << 20) - 2, (1 << 20) + 5])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\x80"])
def test_invalid_utf8_in_text_file(tmp_path: Path, before: int, bad: bytes) -> None:
    path = write(tmp_path / "a.txt", b"first\n" + b"x" * before + bad + b" tail\nlast\n")
    with pytest.raises(ValueError, match=rf"a\.txt, byte {6 + before}: invalid UTF-8"):
        read(path)
    reader = DocumentReader([path], skip_invalid=True)
    (document,) = whole_documents(reader)
    assert document.startswith("first\n") and document.endswith("last\n") and "tail" not in document[: 1 << 20]
    assert reader.skipped == {"invalid UTF-8": 1}


def test_text_file_that_ends_inside_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "good\né".encode()[:-1])
    with pytest.raises(ValueError, match=r"a\.txt, byte 5: invalid UTF-8"):
        read(path)
    assert read(path, skip_invalid=True) == ["good\n"]


def test_text_file_of_white_space(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b" \n\n")
    with pytest.raises(ValueError, match=r"a\.txt: the file has no text"):
        read(path)
    reader = DocumentReader([path, write(tmp_path / "b.txt", b"b")], skip_invalid=True)
    assert whole_documents(reader) == ["b"] and reader.skipped == {"empty text": 1}


def test_bad_parquet(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"bad \xff", None, b"last"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "number": [1, 2, 3, 4]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1, byte 4 of the text: invalid UTF-8"):
        read(path)
    reader = DocumentReader([path], skip_invalid=True)
    assert whole_documents(reader) == ["good", "last"]
    assert reader.skipped == {"invalid UTF-8": 1, "missing text": 1}
    with pytest.raises(ValueError, match="no column 'body': choose one of text, number with --key"):
        read(path, key="body")
    with pytest.raises(ValueError, match="the column 'number' holds int64, not text"):
        read(path, key="number")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file, or is damaged"):
        read(path)


def test_one_json_array_instead_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_step.data.documents._MAX_RECORD_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", json.dumps([{"text": "x" * 2000}]))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the line is longer than .* one JSON array"):
        read(path, skip_invalid=True)


@pytest.mark.parametrize("skip_invalid", [False, True])
@pytest.mark.parametrize("line", ["some words in a line\n", "no line feed in this text "])
def test_memory_is_flat(tmp_path: Path, line: str, skip_invalid: bool) -> None:
    peaks = []
    for size_mib in (4, 16):
        path = write(tmp_path / "a.txt", line * ((size_mib << 20) // len(line)))
        tracemalloc.start()
        for _ in DocumentReader([path], skip_invalid=skip_invalid):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 16 << 20

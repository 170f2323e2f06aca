"""Text is read from every type that tables keep text in, and other types are refused by name."""

from pathlib import Path

import pyarrow as pa
import pytest

from megatron_step.data.parquet_column import text_column, values_in_bytes

_TEXTS = ["a", None, "é木"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.json_(),
    ],
    ids=str,
)
def test_types_of_text(kind: pa.DataType) -> None:
    stored = pa.array(_TEXTS, kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind)
    column = pa.ExtensionArray.from_storage(kind, stored) if isinstance(kind, pa.BaseExtensionType) else stored
    text_column(Path("a.parquet"), pa.table({"text": column}).schema, "text")
    assert values_in_bytes(column) == [b"a", None, "é木".encode()]


@pytest.mark.parametrize(
    "kind",
    [
        pa.int64(),
        pa.list_(pa.string()),
        pa.struct([("a", pa.string())]),
        pa.null(),
        pa.dictionary(pa.int8(), pa.int8()),
    ],
    ids=str,
)
def test_other_types_are_named(kind: pa.DataType) -> None:
    with pytest.raises(ValueError, match="a.parquet: the column 'text' holds .*, not text: choose a text column"):
        text_column(Path("a.parquet"), pa.schema([("text", kind)]), "text")


def test_a_column_must_be_there_once() -> None:
    with pytest.raises(ValueError, match="a.parquet has no column 'text': choose one of a, b with --key"):
        text_column(Path("a.parquet"), pa.schema([("a", pa.string()), ("b", pa.string())]), "text")
    with pytest.raises(ValueError, match="a.parquet has 2 columns 'text'"):
        text_column(Path("a.parquet"), pa.schema([("text", pa.string()), ("text", pa.string())]), "text")

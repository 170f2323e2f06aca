"""The text column of a .parquet file, in any type that can hold text."""

from pathlib import Path
from typing import Any


def text_column(path: Path, schema: Any, key: str) -> None:
    """Raise ValueError unless the file has exactly one column `key`, and the column can hold text."""
    count = schema.names.count(key)
    if count == 0:
        raise ValueError(f"{path} has no column '{key}': choose one of {', '.join(schema.names)} with --key")
    if count > 1:
        raise ValueError(f"{path} has {count} columns '{key}': rename all but one of them")
    kind = _stored_type(schema.field(schema.get_field_index(key)).type)
    if not _holds_bytes(kind):
        raise ValueError(f"{path}: the column '{key}' holds {kind}, not text: choose a text column with --key")


def values_in_bytes(column: Any) -> list[bytes | None]:
    """Return a column's values as bytes; pyarrow's decoding to text would not report the place of invalid UTF-8."""
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _stored_type(kind: Any) -> Any:
    """Return the type of a column's values: a dictionary's value type, or an extension type's storage type."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    texts = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)  # some writers store UTF-8 as binary
    return any(matches(kind) for matches in (*texts, *binaries))

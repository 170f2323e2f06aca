"""The column of a .parquet file that holds text, in any of the types that tables keep text in."""

from pathlib import Path
from typing import Any


def text_column(path: Path, schema: Any, key: str) -> None:
    """Raise ValueError unless the file has one column `key`, and it can hold text."""
    count = schema.names.count(key)
    if count == 0:
        raise ValueError(f"{path} has no column '{key}': name one of {', '.join(schema.names)} with --key")
    if count > 1:
        raise ValueError(f"{path} has {count} columns '{key}': rename all but one of them")
    kind = _stored_type(schema.field(schema.get_field_index(key)).type)
    if not _holds_bytes(kind):
        raise ValueError(f"{path}: the column '{key}' holds {kind}, not text: name a text column with --key")


def values_in_bytes(column: Any) -> list[bytes | None]:
    """A column's values as bytes: pyarrow itself would stop at the first invalid UTF-8 without saying where."""
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _stored_type(kind: Any) -> Any:
    """The type of the values themselves: of a dictionary's entries, of what an extension type is stored as."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    texts = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)  # UTF-8, by writers that say no more
    return any(matches(kind) for matches in (*texts, *binaries))

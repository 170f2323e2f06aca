"""Which token ends a document."""

from collections.abc import Callable

_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""Tokens that mark the end of a text where the tokenizer itself does not say which one does."""


def end_of_document_id(path: str, id_of: Callable[[str], int | None], chosen: str | None, default: int | None) -> int:
    """Id of the `chosen` token, else the `default` of the tokenizer at `path`, else that of a usual end of text.

    `id_of` gives the id of a token, or None if the tokenizer has no such token.

    Raises ValueError if there is none.
    """
    if chosen is not None:
        index = id_of(chosen)
        if index is None:
            usual = ", ".join(token for token in _END_OF_TEXT if id_of(token) is not None)
            raise ValueError(
                f"the tokenizer {path} has no token {chosen!r} to end documents with: choose one of its tokens"
                + (f", as {usual}" if usual else "")
            )
        return index
    if default is not None:
        return default
    found = [index for index in map(id_of, _END_OF_TEXT) if index is not None]
    if not found:
        raise ValueError(
            f"the tokenizer {path} has no token to end a document: set eos_token in its tokenizer_config.json, or name "
            "one of its tokens as end_of_document"
        )
    return found[0]

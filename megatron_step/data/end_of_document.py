"""Choose the token that ends a document."""

from collections.abc import Callable

_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""Usual end-of-text tokens, for a tokenizer that does not name its own."""


def end_of_document_id(path: str, id_of: Callable[[str], int | None], chosen: str | None, default: int | None) -> int:
    """Return the id of the token that ends a document, for the tokenizer at `path`.

    It is the id of the token `chosen`, else the id `default`, else the id of a usual end-of-text token; `chosen` and
    `default` may be None. `id_of` returns the id of a token, or None if the tokenizer lacks the token.

    Raises ValueError if the tokenizer lacks the chosen token, or every usual one.
    """
    if chosen is not None:
        index = id_of(chosen)
        if index is None:
            usual = ", ".join(token for token in _END_OF_TEXT if id_of(token) is not None)
            raise ValueError(
                f"the tokenizer {path} lacks the token {chosen!r}, which should end documents: choose one of its tokens"
                + (f", such as {usual}" if usual else "")
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

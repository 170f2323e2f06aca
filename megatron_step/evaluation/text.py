"""The text that a model is evaluated on, as tokens: from text files, or from a corpus that is tokenized already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_step.data.check import Corpus, check_corpus
from megatron_step.data.documents import DocumentReader
from megatron_step.data.encoder_pool import encode_pieces
from megatron_step.data.indexed_format import HEADER, corpus_paths, token_dtype
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TokenizedText:
    """The documents of a text, one after the other, in memory."""

    tokens: np.ndarray
    """An end-of-document token, then each document's tokens with one behind them. [1 + n]"""
    num_documents: int
    num_bytes: int
    """Bytes of the documents' text in UTF-8, without what separates them."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Records (in .txt: lines) that were left out, by reason."""


def text_of_files(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    key: str = "text",
    separator: str | None = None,
    skip_invalid: bool = False,
) -> TokenizedText:
    """The documents of text files, with the tokens that preprocessing gives them; for the options see `DocumentReader`.

    Raises ValueError for text that cannot be used, and where there is none.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    reader = DocumentReader(files, key, separator, skip_invalid)
    parts, num_documents, num_bytes = [np.array([tokenizer.eod_id], dtype)], 0, 0
    for piece in reader:
        parts.append(encode_pieces(tokenizer, [piece], dtype).tokens)
        num_documents += piece.ends_document
        num_bytes += len(piece.text.encode())
    if num_bytes == 0:
        raise ValueError(f"the input holds no document (skipped: {reader.skipped or 'nothing'})")
    return TokenizedText(np.concatenate(parts), num_documents, num_bytes, reader.skipped)


def text_of_corpus(prefix: str, tokenizer: Tokenizer) -> TokenizedText:
    """The documents of PREFIX.bin and PREFIX.idx; their bytes are those of the decoded tokens.

    Raises FileNotFoundError and ValueError as `check_corpus` does, and ValueError where there is no text.
    """
    corpus, tokenizer = _fitting(prefix, tokenizer)
    paths = corpus_paths(prefix)
    tokens = np.fromfile(paths.bin, corpus.dtype)
    lengths = np.fromfile(paths.idx, "<i4", corpus.documents, offset=HEADER.size)
    num_bytes = 0
    for document in np.split(tokens, np.cumsum(lengths, dtype=np.int64)[:-1]):
        ids = document.tolist()
        if ids[-1:] == [tokenizer.eod_id]:
            ids.pop()
        num_bytes += len(tokenizer.decode(ids).encode())
    if num_bytes == 0:
        raise ValueError(f"{prefix} holds no text")
    begin = np.array([tokenizer.eod_id], corpus.dtype)
    return TokenizedText(np.concatenate([begin, tokens]), corpus.documents, num_bytes)


def _fitting(prefix: str, tokenizer: Tokenizer) -> tuple[Corpus, Tokenizer]:
    """The corpus, and the tokenizer that made it: beside an exported one lies its SentencePiece model."""
    original = Path(tokenizer.path, "tokenizer.model")
    if original.is_file():
        try:
            made_by = load_tokenizer(original, tokenizer.token(tokenizer.eod_id))
            return check_corpus(prefix, made_by), made_by
        except ValueError:
            pass  # it was made by `tokenizer`, or else cannot be used, as the next line says
    return check_corpus(prefix, tokenizer), tokenizer

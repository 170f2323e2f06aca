"""Read the tokens of a text to evaluate on, from text files or from a tokenized corpus."""

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
    """The tokens of a text's documents in sequence, in memory."""

    tokens: np.ndarray
    """An end-of-document token, then each document's tokens and an end-of-document token, [1 + n]."""
    num_documents: int
    """Number of documents."""
    num_bytes: int
    """Bytes of the documents' text in UTF-8, without separators."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of skipped records (in .txt: lines) by reason."""


def text_of_files(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    key: str = "text",
    separator: str | None = None,
    skip_invalid: bool = False,
) -> TokenizedText:
    """Tokenize text files as preprocessing does; `DocumentReader` explains the options.

    Raises ValueError for unusable text, and if there is no text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    reader = DocumentReader(files, key, separator, skip_invalid)
    tokens, num_documents, num_bytes = [np.array([tokenizer.eod_id], dtype)], 0, 0
    for piece in reader:
        tokens.append(encode_pieces(tokenizer, [piece], dtype).tokens)
        num_documents += piece.ends_document
        num_bytes += len(piece.text.encode())
    if num_bytes == 0:
        raise ValueError(f"the input holds no document (skipped: {reader.skipped or 'nothing'}): give files with text")
    return TokenizedText(np.concatenate(tokens), num_documents, num_bytes, reader.skipped)


def text_of_corpus(prefix: str, tokenizer: Tokenizer) -> TokenizedText:
    """Read the tokens of PREFIX.bin and PREFIX.idx, and count the bytes of the decoded documents.

    Raises FileNotFoundError and ValueError as `check_corpus` does, and ValueError if there is no text.
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
        raise ValueError(f"the corpus {prefix} holds no text: give another one")
    begin = np.array([tokenizer.eod_id], corpus.dtype)
    return TokenizedText(np.concatenate([begin, tokens]), corpus.documents, num_bytes)


def _fitting(prefix: str, tokenizer: Tokenizer) -> tuple[Corpus, Tokenizer]:
    """Check the corpus against the tokenizer, or against the SentencePiece model in the tokenizer's folder.

    Returns the corpus and the tokenizer that it was made with.
    """
    original = Path(tokenizer.path, "tokenizer.model")
    if original.is_file():
        try:
            made_by = load_tokenizer(original, tokenizer.token(tokenizer.eod_id))
            return check_corpus(prefix, made_by), made_by
        except ValueError:
            pass  # the corpus was made with `tokenizer`, or the next line raises
    return check_corpus(prefix, tokenizer), tokenizer

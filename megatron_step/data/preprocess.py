"""Turn text files into a tokenized corpus, in several processes, with memory that does not grow with the input."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_step.data.corpus_writer import CorpusWriter
from megatron_step.data.documents import DocumentReader
from megatron_step.data.encoder_pool import EncoderPool
from megatron_step.data.indexed_format import token_dtype
from megatron_step.data.pieces import Piece
from megatron_step.data.text_files import find_text_files
from megatron_step.data.tokenizer import end_of_document_line, load_tokenizer

_CHUNK_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class PreprocessSummary:
    """The content of a new corpus, and the input that was not used."""

    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens."""
    skipped: dict[str, int]
    """Number of skipped records (in .txt: lines) by reason."""
    left_out: list[str]
    """Report lines about files in folders that were not read."""
    end_of_document: str
    """Report line about the token that ends documents."""


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer_path: str,
    key: str = "text",
    separator: str | None = None,
    skip_invalid: bool = False,
    workers: int = 1,
    end_of_document: str | None = None,
    progress: Callable[[int, int], None] = lambda bytes_read, total_bytes: None,
) -> PreprocessSummary:
    """Tokenize files and folders of text into PREFIX.bin, PREFIX.idx and PREFIX.json.

    The token `end_of_document` follows each document; None takes the tokenizer's end-of-text token. The files do not
    depend on `workers`. `progress` is called with the bytes of input read so far and the total bytes. `DocumentReader`
    explains the other options.

    Raises FileNotFoundError for missing input, ValueError for bad input (also if no document is left), and OSError if
    the corpus cannot be written. After an error no corpus is left.
    """
    if Path(prefix).is_dir() or str(prefix).endswith("/"):
        raise ValueError(f"the output {prefix} is a folder: give the path prefix of the files, such as data/train")
    if separator == "":
        raise ValueError("--document-separator is empty: omit it to make each .txt file one document")
    found = find_text_files(inputs)
    files = found.files
    total_bytes = sum(file.stat().st_size for file in files)
    tokenizer = load_tokenizer(tokenizer_path, end_of_document)
    dtype = token_dtype(tokenizer.vocab_size)
    reader = DocumentReader(files, key, separator, skip_invalid)
    with EncoderPool(tokenizer, workers, dtype) as pool, CorpusWriter(prefix, dtype) as writer:
        for encoded in pool.map(_chunks(reader)):
            writer.write(encoded.tokens, encoded.lengths, encoded.ends_document)
            progress(reader.bytes_read, total_bytes)
        if writer.num_documents == 0:
            raise ValueError(
                f"the input holds no document (skipped: {reader.skipped or 'nothing'}): give files with text"
            )
        writer.commit(
            {
                "tokenizer": {
                    "name": Path(tokenizer.path).name,
                    "fingerprint": tokenizer.fingerprint,
                    "vocab_size": tokenizer.vocab_size,
                    "eod_id": tokenizer.eod_id,
                },
                "sources": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
                "left_out": [{"name": path.name, "reason": reason} for path, reason in found.left_out],
                "skipped": reader.skipped,
            }
        )
        ends = end_of_document_line(tokenizer)
        return PreprocessSummary(writer.num_documents, writer.num_tokens, dict(reader.skipped), found.report, ends)


def _chunks(pieces: DocumentReader) -> Iterator[list[Piece]]:
    """Yield pieces in lists long enough to send to a worker."""
    chunk: list[Piece] = []
    characters = 0
    for piece in pieces:
        chunk.append(piece)
        characters += len(piece.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk

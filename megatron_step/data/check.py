"""Check corpora before training: their files must be complete, and the tokenizer must know their token ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_step.config.counts import counted
from megatron_step.config.data import DataConfig
from megatron_step.config.yaml_json import read_json
from megatron_step.data.indexed_format import DTYPES, HEADER, MAGIC, VERSION, CorpusPaths, corpus_paths, idx_bytes
from megatron_step.data.tokenizer import Tokenizer

_BLOCK_SEQUENCES = 1 << 20
_SCAN_BLOCKS = 64
_SCAN_BLOCK_TOKENS = 1 << 16
_REMAKE = "make it again with megatron-step preprocess"


@dataclass(frozen=True)
class Corpus:
    """A corpus whose files are complete."""

    prefix: str
    """Path prefix of its files."""
    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens."""
    dtype: np.dtype
    """Type of the token ids in the .bin file."""


def check_corpora(config: DataConfig, tokenizer: Tokenizer) -> list[Corpus]:
    """Check every corpus that a run trains or evaluates on, as `check_corpus` does."""
    prefixes = [prefix for _, prefix in (*config.train, *(config.validation or ()))]
    return [check_corpus(prefix, tokenizer) for prefix in dict.fromkeys(prefixes)]


def check_corpus(prefix: str, tokenizer: Tokenizer) -> Corpus:
    """Check one corpus against its index, its side file and the tokenizer.

    The check reads all lengths and offsets of the index, but not the tokens. Without a side file it compares up to
    4 million ids, spread over the corpus, with the vocabulary.

    Raises FileNotFoundError if a file is missing, and ValueError if a file is empty, truncated or damaged, or was made
    with another tokenizer.
    """
    paths = corpus_paths(prefix)
    check_files(paths)
    dtype, num_sequences, num_boundaries = _read_header(paths.idx)
    tokens = _check_index(paths.idx, dtype, num_sequences, num_boundaries)
    expected, actual = tokens * dtype.itemsize, paths.bin.stat().st_size
    if actual != expected:
        raise ValueError(
            f"{paths.bin} has {counted(actual, 'byte')}, but {paths.idx.name} says {expected:,}: the file is "
            f"incomplete or belongs to another corpus; {_REMAKE}"
        )
    corpus = Corpus(prefix, num_sequences, tokens, dtype)
    if paths.side.exists():
        _check_side_file(paths.side, corpus, tokenizer)
    else:
        _check_ids(paths.bin, corpus, tokenizer)
    return corpus


def check_files(paths: CorpusPaths) -> None:
    """Raise FileNotFoundError or ValueError if a file of a corpus is missing or empty."""
    for path in (paths.bin, paths.idx):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give the path prefix of a corpus, or {_REMAKE}")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty: {_REMAKE}")


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Read the ids' dtype and the numbers of sequences and of document boundaries from an .idx file.

    Raises ValueError if the header is damaged, or does not fit the file's size.
    """
    size = path.stat().st_size
    if size < HEADER.size:
        raise ValueError(f"{path} has {counted(size, 'byte')}, but its header alone needs {HEADER.size}: {_REMAKE}")
    with path.open("rb") as file:
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{path} is not the index of a Megatron corpus, or is damaged: {_REMAKE}")
    if code not in DTYPES or DTYPES[code].kind == "f":
        raise ValueError(f"{path} is damaged, or does not hold token ids (its dtype code is {code}): {_REMAKE}")
    expected = idx_bytes(num_sequences, num_boundaries)
    if size not in (expected, expected + num_sequences):  # multimodal corpora have one more byte per sequence
        raise ValueError(
            f"{path} has {counted(size, 'byte')}, but its header says {expected:,}: the file is incomplete; {_REMAKE}"
        )
    if num_sequences == 0:
        raise ValueError(f"{path} holds no document: {_REMAKE}")
    return DTYPES[code], num_sequences, num_boundaries


def _check_index(path: Path, dtype: np.dtype, num_sequences: int, num_boundaries: int) -> int:
    """Check that lengths, offsets and document boundaries agree, and return the number of tokens.

    Raises ValueError if they do not agree.
    """
    lengths = np.memmap(path, "<i4", "r", HEADER.size, (num_sequences,))
    pointers = np.memmap(path, "<i8", "r", HEADER.size + 4 * num_sequences, (num_sequences,))
    end = 0
    for start in range(0, num_sequences, _BLOCK_SEQUENCES):
        block = lengths[start : start + _BLOCK_SEQUENCES].astype(np.int64)
        # pointer[i] = itemsize * (length[0] + ... + length[i - 1])
        ends = end + np.cumsum(block) * dtype.itemsize
        if block.min() < 0 or not np.array_equal(ends - block * dtype.itemsize, pointers[start : start + len(block)]):
            raise ValueError(f"{path} is damaged: the lengths and offsets of its documents do not agree; {_REMAKE}")
        end = int(ends[-1])
    boundaries = np.memmap(path, "<i8", "r", HEADER.size + 12 * num_sequences, (num_boundaries,))
    if num_boundaries < 2 or boundaries[0] != 0 or boundaries[-1] != num_sequences or np.any(np.diff(boundaries) < 0):
        raise ValueError(f"{path} is damaged: its document boundaries do not cover its sequences; {_REMAKE}")
    return end // dtype.itemsize


def _check_side_file(path: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    try:
        side: dict[str, Any] = read_json(path)
        made_by, documents, tokens = side["tokenizer"], int(side["documents"]), int(side["tokens"])
        name, fingerprint = made_by["name"], str(made_by["fingerprint"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged, or does not describe a corpus: {_REMAKE}") from error
    if (documents, tokens) != (corpus.documents, corpus.tokens):
        raise ValueError(
            f"{path} describes {counted(documents, 'document')} and {counted(tokens, 'token')}, but the corpus has "
            f"{corpus.documents:,} and {corpus.tokens:,}: {_REMAKE}, or delete {path.name} if another tool made the "
            "corpus"
        )
    if fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{corpus.prefix} was tokenized with {name} ({fingerprint[:12]}), not with {tokenizer.path} "
            f"({tokenizer.fingerprint[:12]}): set data.tokenizer to that tokenizer, or {_REMAKE}"
        )


def _check_ids(path: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Compare blocks of ids, evenly spread from the first to the last, with the vocabulary."""
    tokens = np.memmap(path, corpus.dtype, "r", shape=(corpus.tokens,))
    last_start = max(0, corpus.tokens - _SCAN_BLOCK_TOKENS)
    for start in np.unique(np.linspace(0, last_start, _SCAN_BLOCKS).astype(np.int64)):
        block = tokens[start : start + _SCAN_BLOCK_TOKENS]
        worst = block.max() if block.max() >= tokenizer.vocab_size else block.min()
        if not 0 <= worst < tokenizer.vocab_size:
            raise ValueError(
                f"{path} holds the token id {worst}, but {tokenizer.path} has "
                f"{counted(tokenizer.vocab_size, 'token')}: set data.tokenizer to the tokenizer that the corpus was "
                f"made with, or {_REMAKE}"
            )

"""Megatron-Core's corpus format (PREFIX.bin and PREFIX.idx): its header, and a streaming writer for the index.

PREFIX.bin holds the token ids of all documents in sequence. PREFIX.idx holds, little-endian:

    9 bytes     magic "MMIDIDX\\0\\0"
    uint64      version, 1
    uint8       code of the ids' dtype
    uint64      number of sequences n (here a sequence is a document)
    uint64      number of document boundaries, n + 1 here
    int32[n]    length of each sequence in tokens
    int64[n]    offset of each sequence in PREFIX.bin, in bytes
    int64[n+1]  the sequences at which documents begin, and n

megatron-core's `IndexedDatasetBuilder` writes the same bytes (megatron/core/datasets/indexed_dataset.py), but needs
torch and keeps tens of bytes per document in memory.
"""

import struct
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
"""The ids' dtypes by their code in the header."""
_BLOCK_DOCUMENTS = 1 << 20


class CorpusPaths(NamedTuple):
    """The paths of a corpus's files."""

    bin: Path
    """File of the token ids."""
    idx: Path
    """File of the index."""
    side: Path
    """File that describes the corpus's tokenizer and sources, as JSON; corpora of other tools lack it."""


def corpus_paths(prefix: str | Path) -> CorpusPaths:
    """Return the paths of the corpus `prefix`."""
    return CorpusPaths(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json"))


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype that megatron-core takes for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def idx_bytes(num_sequences: int, num_boundaries: int) -> int:
    """Size of an .idx file in bytes."""
    return HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8


class IndexWriter:
    """Writer of an .idx file: `add` writes document lengths, and `finish` all other fields."""

    def __init__(self, file: IO[bytes], dtype: np.dtype) -> None:
        self._file = file
        self._dtype = dtype
        self.num_documents = 0
        self._file.write(bytes(HEADER.size))  # a placeholder: the counts are known at the end

    def add(self, lengths: np.ndarray) -> None:
        """Append documents of these lengths, in tokens."""
        self._file.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(lengths)

    def finish(self) -> None:
        """Write the offsets, the document boundaries and the header."""
        self._write_pointers()
        for start in range(0, self.num_documents + 1, _BLOCK_DOCUMENTS):
            stop = min(start + _BLOCK_DOCUMENTS, self.num_documents + 1)
            self._file.write(np.arange(start, stop, dtype="<i8").tobytes())
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1))
        self._file.flush()

    def _write_pointers(self) -> None:
        # pointer[i] = itemsize * (length[0] + ... + length[i - 1])
        end = 0
        for start in range(0, self.num_documents, _BLOCK_DOCUMENTS):
            count = min(_BLOCK_DOCUMENTS, self.num_documents - start)
            self._file.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(self._file.read(4 * count), dtype="<i4").astype("<i8")
            ends = end + np.cumsum(lengths * self._dtype.itemsize)
            self._file.seek(HEADER.size + 4 * self.num_documents + 8 * start)
            self._file.write((ends - lengths * self._dtype.itemsize).tobytes())
            end = int(ends[-1])
        self._file.seek(0, 2)

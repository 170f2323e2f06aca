"""Write a corpus (PREFIX.bin, PREFIX.idx, PREFIX.json) so that a crash never leaves a half-written corpus."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron_step.data.indexed_format import CorpusPaths, IndexWriter, corpus_paths
from megatron_step.engine.output_lock import lock_beside, output_lock

_MAX_DOCUMENT_TOKENS = 2**31 - 1


class CorpusWriter:
    """Context manager that writes a corpus under temporary names until `commit` renames the files.

    Leaving the context without `commit` deletes the temporary files.

    Raises InUseError if another process writes the same corpus, ValueError if a document has 2^31 tokens or more, and
    OSError if the disk is full or the folder cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self._final = corpus_paths(prefix)
        self._temporary = CorpusPaths(*(path.with_name(path.name + ".tmp") for path in self._final))
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self._open_length = 0
        self._committed = False
        self.num_tokens = 0

    def __enter__(self) -> "CorpusWriter":
        self._lock = ExitStack()
        self._lock.enter_context(output_lock(lock_beside(self._final.bin), self._final.bin))
        try:
            self._bin = self._temporary.bin.open("wb")
            self._idx = self._temporary.idx.open("w+b")
        except OSError:
            self._lock.close()
            raise
        self._index = IndexWriter(self._idx, self._dtype)
        return self

    @property
    def num_documents(self) -> int:
        """Number of complete documents so far."""
        return self._index.num_documents

    def write(self, tokens: np.ndarray, piece_lengths: np.ndarray, ends_document: np.ndarray) -> None:
        """Append pieces of documents: the tokens of all pieces, each piece's length, and whether it ends a document."""
        data = tokens.astype(self._dtype, copy=False).tobytes()
        with _naming(self._final.bin):
            self._bin.write(data)
        self._digest.update(data)
        self.num_tokens += len(tokens)
        # ends[i]: tokens from the start of the open document to the end of piece i
        ends = self._open_length + np.cumsum(piece_lengths, dtype=np.int64)
        lengths = np.diff(ends[ends_document], prepend=0)
        self._open_length = int(ends[-1] - lengths.sum()) if len(ends) else self._open_length
        if max(self._open_length, lengths.max(initial=0)) > _MAX_DOCUMENT_TOKENS:
            raise ValueError(
                "a document has 2^31 tokens or more, which the format cannot hold: split it with --document-separator"
            )
        with _naming(self._final.idx):
            self._index.add(lengths)

    def commit(self, description: dict[str, Any]) -> dict[str, Any]:
        """Finish the files, write `description` and the sizes to the side file, and rename all files.

        Returns the content of the side file. Raises ValueError if the last document has no end.
        """
        if self._open_length:
            raise ValueError("the last document has no end")
        with _naming(self._final.bin):
            self._bin.flush()
        side = {
            **description,
            "dtype": self._dtype.name,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "bin_bytes": self._bin.tell(),
            "bin_sha256": self._digest.hexdigest(),
        }
        with _naming(self._final.idx):
            self._index.finish()
            self._temporary.side.write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")
            for file in (self._bin, self._idx):
                os.fsync(file.fileno())
        # A corpus exists once its .idx exists. The old .idx goes first, so that it never lies beside a new .bin.
        self._final.idx.unlink(missing_ok=True)
        os.replace(self._temporary.bin, self._final.bin)
        os.replace(self._temporary.side, self._final.side)
        os.replace(self._temporary.idx, self._final.idx)
        self._committed = True
        self._lock.close()
        return side

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            for path in self._temporary:
                path.unlink(missing_ok=True)
        self._lock.close()
        for file in (self._idx, self._bin):
            _close_quietly(file, error is not None)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file's path to an OSError; the error of a full disk lacks it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def _close_quietly(file: IO[bytes], failed: bool) -> None:
    """Close a file; if writing failed, ignore the error of closing, which has the same cause (a full disk)."""
    try:
        file.close()
    except OSError:
        if not failed:
            raise

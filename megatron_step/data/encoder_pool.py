"""Tokenize in worker processes: pieces of documents in, arrays of token ids out, in order, with few in flight.

Workers import neither torch nor transformers: they get the tokenizer as the parent loaded it.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

import numpy as np

from megatron_step.data.pieces import Piece
from megatron_step.data.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """The tokens of some pieces."""

    tokens: np.ndarray
    """Ids of all pieces, one after the other, the end-of-document token behind each piece that ends one. [tokens]"""
    lengths: np.ndarray
    """Tokens of each piece. [pieces] int64"""
    ends_document: np.ndarray
    """Whether a piece is its document's last. [pieces] bool"""


def encode_pieces(tokenizer: Tokenizer, pieces: list[Piece], dtype: np.dtype) -> Encoded:
    """Tokenize pieces of documents.

    Raises ValueError where the tokenizer emits an id beyond its vocabulary.
    """
    ids: list[int] = []
    lengths = np.empty(len(pieces), dtype=np.int64)
    for index, piece_ids in enumerate(tokenizer.encode_batch([piece.text for piece in pieces])):
        start = len(ids)
        ids.extend(piece_ids)
        if pieces[index].ends_document:
            ids.append(tokenizer.eod_id)
        lengths[index] = len(ids) - start
    tokens = np.array(ids, dtype=np.int64)
    if len(tokens) and tokens.max() >= tokenizer.vocab_size:
        raise ValueError(f"{tokenizer.path} emits the id {tokens.max()}, its vocabulary is {tokenizer.vocab_size}")
    return Encoded(tokens.astype(dtype), lengths, np.array([piece.ends_document for piece in pieces], dtype=bool))


class EncoderPool:
    """Worker processes that share a stream of chunks, each a list of pieces.

    One thread for each worker sends a chunk and waits for its tokens, so neither side blocks on a full pipe while the
    other does. A worker ends when its pipe closes, also where the parent was killed.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int, dtype: np.dtype) -> None:
        if workers < 1:
            raise ValueError(f"--workers is {workers}: at least one process is needed")
        self._workers = workers
        self._arguments = (tokenizer, dtype.str)
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()

    def __enter__(self) -> "EncoderPool":
        context = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads' locks
        for _ in range(self._workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._idle.put(ours)
        self._threads = ThreadPoolExecutor(self._workers)
        return self

    def map(self, chunks: Iterable[list[Piece]]) -> Iterator[Encoded]:
        """The tokens of each chunk, in order; twice as many chunks as workers are in memory.

        Raises ValueError where a chunk cannot be tokenized, RuntimeError where a worker dies.
        """
        pending: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            pending.append(self._threads.submit(self._encode, chunk))
            if len(pending) >= 2 * self._workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, chunk: list[Piece]) -> Encoded:
        connection = self._idle.get()
        try:
            connection.send(chunk)
            reply = connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a tokenizing process died: was it out of memory? Try fewer --workers") from error
        finally:
            self._idle.put(connection)
        if isinstance(reply, str):
            raise ValueError(reply)
        return reply

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for process in self._processes:
                process.terminate()  # threads that wait for an answer then see the pipe's end
        self._threads.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def _work(connection: Connection, tokenizer: Tokenizer, dtype: str) -> None:
    """A worker's life: chunks in, tokens or an error message out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core here
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        try:
            reply: Encoded | str = encode_pieces(tokenizer, chunk, np.dtype(dtype))
        except Exception as error:
            reply = f"{tokenizer.path} cannot tokenize some text: {error}"
        try:
            connection.send(reply)
        except BrokenPipeError:
            return

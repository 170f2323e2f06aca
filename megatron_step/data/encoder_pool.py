"""Tokenize pieces of documents in worker processes, in order, with few pieces in memory.

Workers import neither torch nor transformers: the parent loads the tokenizer and sends it to them.
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
    """The tokens of a chunk of pieces."""

    tokens: np.ndarray
    """Ids of all pieces, [tokens]; an end-of-document token follows the last piece of each document."""
    lengths: np.ndarray
    """Number of tokens in each piece, [pieces] int64."""
    ends_document: np.ndarray
    """Whether a piece is the last of its document, [pieces] bool."""


def encode_pieces(tokenizer: Tokenizer, pieces: list[Piece], dtype: np.dtype) -> Encoded:
    """Tokenize pieces of documents.

    Raises ValueError if the tokenizer returns an id outside its vocabulary.
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
        raise ValueError(
            f"{tokenizer.path} returns the id {tokens.max()}, but its vocabulary has {tokenizer.vocab_size} tokens: "
            "correct the tokenizer"
        )
    return Encoded(tokens.astype(dtype), lengths, np.array([piece.ends_document for piece in pieces], dtype=bool))


class EncoderPool:
    """Worker processes that tokenize a stream of chunks; a chunk is a list of pieces.

    A thread per worker sends a chunk and waits for its tokens, so that parent and worker never both wait on a full
    pipe. A worker ends when its pipe closes, also if the parent was killed.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int, dtype: np.dtype) -> None:
        if workers < 1:
            raise ValueError(f"--workers is {workers}: it must be at least 1")
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
        """Yield the tokens of each chunk, in order; at most two chunks per worker are in memory.

        Raises ValueError if a chunk cannot be tokenized, and RuntimeError if a worker dies.
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
            raise RuntimeError("a worker process died, perhaps for lack of memory: use fewer --workers") from error
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
                process.terminate()  # this closes the pipes, so that waiting threads end
        self._threads.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def _work(connection: Connection, tokenizer: Tokenizer, dtype: str) -> None:
    """Run a worker: receive chunks and send back their tokens, or an error message, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker uses one core
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        try:
            reply: Encoded | str = encode_pieces(tokenizer, chunk, np.dtype(dtype))
        except Exception as error:
            reply = f"{tokenizer.path} cannot tokenize the text: {error}"
        try:
            connection.send(reply)
        except BrokenPipeError:
            return

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_step.data.encoder_pool import EncoderPool, encode_pieces
from megatron_step.data.pieces import Piece
from megatron_step.data.tokenizer import Tokenizer

UINT16 = np.dtype("<u2")


def test_end_of_document_follows_last_pieces(tokenizer: Tokenizer) -> None:
    encoded = encode_pieces(tokenizer, [Piece("kalo", False), Piece("min", True), Piece("x", True)], UINT16)
    parts = [tokenizer.encode("kalo"), [*tokenizer.encode("min"), 2], [*tokenizer.encode("x"), 2]]
    assert encoded.tokens.tolist() == [*parts[0], *parts[1], *parts[2]] and encoded.tokens.dtype == UINT16
    assert encoded.lengths.tolist() == [len(part) for part in parts]
    assert encoded.ends_document.tolist() == [False, True, True]


def test_order_and_little_in_flight(tokenizer: Tokenizer) -> None:
    asked = []

    def chunks() -> Iterator[list[Piece]]:
        for index in range(40):
            asked.append(index)
            yield [Piece(f"{index} " * (2000 if index % 7 == 0 else 1), True)]

    with EncoderPool(tokenizer, 3, UINT16) as pool:
        for index, encoded in enumerate(pool.map(chunks())):
            assert tokenizer.decode(encoded.tokens.tolist()).split()[0] == str(index)
            assert len(asked) <= index + 6
    assert len(asked) == 40


def test_more_workers_than_chunks_and_no_chunk(tokenizer: Tokenizer) -> None:
    with EncoderPool(tokenizer, 4, UINT16) as pool:
        assert len(list(pool.map(iter([[Piece("a", True)]])))) == 1
        assert list(pool.map(iter([]))) == []


def test_failing_text_is_an_error_here(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="cannot tokenize the text"), EncoderPool(tokenizer, 1, UINT16) as pool:
        list(pool.map(iter([[Piece("\ud800", True)]])))


def test_killed_worker_is_an_error_and_no_hang(tokenizer: Tokenizer) -> None:
    with pytest.raises(RuntimeError, match="a worker process died"), EncoderPool(tokenizer, 2, UINT16) as pool:

        def chunks() -> Iterator[list[Piece]]:
            for index in range(100):
                if index == 10:
                    os.kill(pool._processes[0].pid, signal.SIGKILL)
                yield [Piece("text " * 100, True)]

        list(pool.map(chunks()))
    assert all(process.exitcode is not None for process in pool._processes)


def test_error_of_the_reader_ends_the_workers(tokenizer: Tokenizer) -> None:
    def chunks() -> Iterator[list[Piece]]:
        yield [Piece("text " * 100_000, True)]
        raise ValueError("bad input")

    start = time.monotonic()
    with pytest.raises(ValueError, match="bad input"), EncoderPool(tokenizer, 2, UINT16) as pool:
        list(pool.map(chunks()))
    assert all(process.exitcode is not None for process in pool._processes)
    assert time.monotonic() - start < 30


def test_workers_load_neither_torch_nor_megatron(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, megatron_step.data.encoder_pool, megatron_step.data.preprocess\n"
        "print([name for name in ('torch', 'megatron', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers(tokenizer: Tokenizer, workers: int) -> None:
    with pytest.raises(ValueError, match="--workers is"):
        EncoderPool(tokenizer, workers, UINT16)

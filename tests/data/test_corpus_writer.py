import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_step.data.corpus_writer import CorpusWriter

UINT16 = np.dtype("<u2")


def write(writer: CorpusWriter, lengths: list[int], ends: list[bool]) -> None:
    writer.write(np.arange(sum(lengths)), np.array(lengths, dtype=np.int64), np.array(ends, dtype=bool))


def test_pieces_are_joined_to_documents(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with CorpusWriter(tmp_path / "deep" / "a", UINT16) as writer:
        write(writer, [3, 2], [False, False])
        write(writer, [], [])
        write(writer, [1, 4, 2], [True, True, False])
        write(writer, [5], [True])
        side = writer.commit({"made": "here"})
    corpus = IndexedDataset(str(tmp_path / "deep" / "a"))
    assert [len(document) for document in corpus] == [6, 4, 7]
    content = (tmp_path / "deep" / "a.bin").read_bytes()
    assert np.frombuffer(content, UINT16).tolist() == [*range(5), *range(7), *range(5)]
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == side
    assert side == {
        "made": "here",
        "dtype": "uint16",
        "documents": 3,
        "tokens": 17,
        "bin_bytes": 34,
        "bin_sha256": hashlib.sha256(content).hexdigest(),
    }
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_failure_keeps_what_was_there(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "a", UINT16) as writer:
        write(writer, [3], [True])
        writer.commit({})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="stop"), CorpusWriter(tmp_path / "a", UINT16) as writer:
        write(writer, [30], [True])
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="no end"), CorpusWriter(tmp_path / "a", UINT16) as writer:
        write(writer, [30], [False])
        writer.commit({})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"a.{suffix}.tmp").write_bytes(b"half-written" * 100)
    with CorpusWriter(tmp_path / "a", UINT16) as writer:
        write(writer, [3], [True])
        writer.commit({})
    assert (tmp_path / "a.bin").stat().st_size == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def _write_at_once(prefix: str, answers: "multiprocessing.Queue[str]") -> None:
    try:
        with CorpusWriter(prefix, UINT16):
            answers.put("allowed")
    except ValueError as error:
        answers.put(str(error))


def test_two_processes_cannot_write_one_corpus(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with CorpusWriter(tmp_path / "a", UINT16) as writer:
        process = context.Process(target=_write_at_once, args=(str(tmp_path / "a"), answers))
        process.start()
        assert f"a.bin is in use by process {os.getpid()}" in answers.get(timeout=60)
        process.join()
        write(writer, [3], [True])
        writer.commit({})
        # Committed, so the name is free again while this block is still open.
        with CorpusWriter(tmp_path / "a", UINT16) as second:
            write(second, [4], [True])
            writer.__exit__(None, None, None)
            second.commit({})
    assert (tmp_path / "a.bin").stat().st_size == 8


def test_index_of_another_corpus_is_never_beside_a_new_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CorpusWriter(tmp_path / "a", UINT16) as writer:
        write(writer, [3], [True])
        writer.commit({})
    replace, done = os.replace, []

    def crash_at_second(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash_at_second)
    with pytest.raises(KeyboardInterrupt), CorpusWriter(tmp_path / "a", UINT16) as writer:
        write(writer, [9], [True])
        writer.commit({})
    assert (tmp_path / "a.bin").stat().st_size == 18 and not (tmp_path / "a.idx").exists()


def test_document_of_two_billion_tokens(tmp_path: Path) -> None:
    expected = pytest.raises(ValueError, match=r"2\^31 tokens or more.*--document-separator")
    with expected, CorpusWriter(tmp_path / "a", UINT16) as writer:
        for _ in range(3):
            writer.write(np.array([1]), np.array([2**30]), np.array([False]))
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"cannot write: No space left on device: '.*/a\.bin'"),
        CorpusWriter(tmp_path / "a", UINT16) as writer,
    ):
        writer._bin.close()
        writer._bin = open("/dev/full", "wb")  # noqa: SIM115
        write(writer, [1 << 20], [True])
        writer.commit({})
    assert list(tmp_path.iterdir()) == []

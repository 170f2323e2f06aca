import os
import pickle
import queue
import signal

import pytest

from megatron_step.checkpoint.writer_results import ResultsFile


def put_in_a_fork(results: ResultsFile, result: object) -> None:
    writer = os.fork()
    if writer == 0:
        results.put(result)
        os._exit(0)
    os.waitpid(writer, 0)


@pytest.mark.parametrize("put", [ResultsFile.put, put_in_a_fork])
def test_results_are_taken_once_and_in_turn(put) -> None:
    results = ResultsFile()
    for result in ({0: ["a" * 10_000_000]}, OSError(28, "No space left on device"), {}, {1: ["b"]}):
        put(results, result)
        assert repr(results.get_nowait()) == repr(result)
        with pytest.raises(queue.Empty):
            results.get_nowait()


def test_result_that_nobody_took_is_replaced() -> None:
    results = ResultsFile()
    put_in_a_fork(results, "of a save that failed on another rank, and long")
    put_in_a_fork(results, "next")
    assert results.get_nowait() == "next"


def test_result_of_a_killed_writer_is_none() -> None:
    results = ResultsFile()
    writer = os.fork()
    if writer == 0:
        whole = pickle.dumps(["result"] * 1000)
        results._file.write(whole[: len(whole) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(writer, 0)
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put("next")
    assert results.get_nowait() == "next"

"""A file view reads its bytes and no more; megatron-core's writers take the queue that they are given."""

import queue
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_step.engine.compat.checkpoints import file_view, set_results_queue


def test_a_file_view_reads_its_bytes_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"0123456789")
    with (tmp_path / "bytes").open("rb", buffering=0) as file:
        view = file_view(file, 3, 4)
        assert view.read() == b"3456"
        view.seek(1)
        assert view.read(2) == b"45"


def test_writers_take_the_queue_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_async, "_results_queue", None)  # puts back what other tests have set
    results: queue.Queue = queue.Queue()
    set_results_queue(results)
    assert filesystem_async._get_write_results_queue() is results

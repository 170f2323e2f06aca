"""A file view reads its bytes and no more; megatron-core saves by the writer that it is given."""

import io
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_step.engine.compat.checkpoints import file_view, write_item, writer_class


def test_a_file_view_reads_its_bytes_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"0123456789")
    with (tmp_path / "bytes").open("rb", buffering=0) as file:
        view = file_view(file, 3, 4)
        assert view.read() == b"3456"
        view.seek(1)
        assert view.read(2) == b"45"


def test_an_item_is_appended_where_the_result_says() -> None:
    stream = io.BytesIO(b"before")
    stream.seek(6)
    place = write_item(stream, torch.ones(3), WriteItem(MetadataIndex("w"), WriteItemType.TENSOR), "name").storage_data
    assert (place.relative_path, place.offset, place.offset + place.length) == ("name", 6, len(stream.getvalue()))
    assert torch.equal(torch.load(io.BytesIO(stream.getvalue()[6:])), torch.ones(3))


def test_the_writer_is_replaced_within_the_block_alone() -> None:
    assert strategy.FileSystemWriterAsync is filesystem_async.FileSystemWriterAsync
    with writer_class(dict):
        assert strategy.FileSystemWriterAsync is dict
    assert strategy.FileSystemWriterAsync is filesystem_async.FileSystemWriterAsync

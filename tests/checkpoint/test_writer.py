"""A rank's file holds what torch.save writes of each tensor, and nothing is copied on the way."""

import io
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_step.checkpoint.writer import TensorWriter, in_own_storage, write_file
from megatron_step.checkpoint.writer_results import ResultsFile
from megatron_step.training.memory import measure_host_peak

BUFFER = torch.arange(10_000, dtype=torch.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        BUFFER[17:6017].view(60, 100),
        BUFFER.bfloat16()[1:4],
        BUFFER[:4].view(2, 2).t(),
        BUFFER.clone(),
        torch.nn.Parameter(BUFFER[3:5]),
        BUFFER[5],
        BUFFER[:0],
    ],
    ids=["rows", "bf16", "transposed", "whole", "parameter", "scalar", "empty"],
)
def test_bytes_are_those_of_a_copy(tensor: torch.Tensor) -> None:
    expected, written = io.BytesIO(), io.BytesIO()
    torch.save(tensor.detach().clone(memory_format=torch.contiguous_format), expected)
    torch.save(in_own_storage(tensor), written)
    assert written.getvalue() == expected.getvalue()


def test_many_tensors_are_written_without_a_copy(tmp_path: Path) -> None:
    items = [(_item(number), BUFFER[number : number + 5000]) for number in range(20)]
    results = ResultsFile()
    _, peak = measure_host_peak(lambda: write_file(tmp_path / "file", 3, items, results))
    assert peak < 5000 * 4  # not one of them
    ((rank, written),) = results.get_nowait().items()
    assert rank == 3
    content = (tmp_path / "file").read_bytes()
    for number, result in enumerate(written):
        place = result.storage_data
        assert (result.index.fqn, place.relative_path) == (str(number), "file")
        tensor = torch.load(io.BytesIO(content[place.offset : place.offset + place.length]))
        assert torch.equal(tensor, BUFFER[number : number + 5000])


def test_what_goes_wrong_is_left_in_the_results(tmp_path: Path) -> None:
    results = ResultsFile()
    write_file(tmp_path / "missing" / "file", 0, [(_item(0), BUFFER)], results)
    assert isinstance(results.get_nowait(), FileNotFoundError)


def test_a_rank_without_tensors_writes_nothing_and_no_process_is_started(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    writer = TensorWriter(tmp_path)
    plan = SimpleNamespace(items=[], storage_data=SimpleNamespace(prefix="__0_"))
    writer.prepare_write_data(plan, None)
    assert writer.get_save_function_and_args() == (None, None, [])
    assert writer.retrieve_write_results() == []
    assert set(psutil.Process().children(recursive=True)) == before


def _item(number: int) -> WriteItem:
    return WriteItem(MetadataIndex(str(number)), WriteItemType.TENSOR)

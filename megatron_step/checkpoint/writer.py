"""Writes what a rank saves into one file, a tensor at a time.

megatron-core's writer copies every tensor that is a view, all at once, before it writes the first: the weights and
states of a data-parallel buffer are views. Here a tensor is copied alone, and only if it is on a device.
"""

import os
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from megatron_step.checkpoint.writer_results import ResultsFile
from megatron_step.engine.compat.checkpoints import write_item

_Items: TypeAlias = list[tuple[WriteItem, Tensor | BytesIO]]


class TensorWriter(FileSystemWriterAsync):
    """megatron-core's writer with one file for each rank, and without copies.

    A save at once runs `write_file` in this process. A save in the background first copies what is on a device
    to the host; a fork of this process then writes, and sees the host's tensors as they were at the fork.
    """

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Note what this rank writes. The tensors are the live ones."""
        items = [(item, planner.resolve_data(item)) for item in plan.items]
        self._name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self.write_buckets = [items] if items else []
        self.results_queue = ResultsFile() if items else None

    def get_save_function_and_args(self) -> tuple[Any, Any, list[Any]]:
        """The function that writes, the one that copies to the host, and what the first takes; for `AsyncRequest`."""
        if not self.write_buckets:
            return None, None, []
        items = self.write_buckets[0]
        write = partial(write_file, Path(self.checkpoint_dir) / self._name)
        return write, partial(_copied_to_host, items), [torch.distributed.get_rank(), items, self.results_queue]


def write_file(path: Path, rank: int, items: _Items, results: ResultsFile) -> None:
    """Write the items of a rank, and leave in `results` where they are in the file, or what went wrong."""
    try:
        with path.open("wb") as stream:
            written = [write_item(stream, in_own_storage(data), item, path.name) for item, data in items]
            os.fsync(stream.fileno())
    except Exception as error:
        results.put(error)
        return
    results.put({rank: written})


def in_own_storage(data: Tensor | BytesIO) -> Tensor | BytesIO:
    """The tensor on the host in a storage of just its elements, because torch.save writes whole storages.

    A contiguous tensor on the host is not copied: the storage is a view of the same memory.
    """
    if isinstance(data, BytesIO):
        return data
    tensor = data.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    memory = tensor.view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)


def _copied_to_host(items: _Items) -> _Items:
    """The items with those tensors on the host that are on a device."""
    return [(item, data.cpu() if isinstance(data, Tensor) else data) for item, data in items]

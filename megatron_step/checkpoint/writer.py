"""Write the tensors of a rank into one file, one tensor at a time.

The weights and states of a data-parallel buffer are views. megatron-core's writer copies all views before it writes the
first tensor. Here, one tensor is copied at a time, and only if it is on a device.
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

    A synchronous save runs `write_file` in this process. An asynchronous save first copies the tensors of a device to
    the host. A fork of this process then writes; it sees the host's tensors as they were at the fork.
    """

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Note the tensors that this rank writes. They are the live tensors."""
        items = [(item, planner.resolve_data(item)) for item in plan.items]
        self._name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self.write_buckets = [items] if items else []
        self.results_queue = ResultsFile() if items else None

    def get_save_function_and_args(self) -> tuple[Any, Any, list[Any]]:
        """Return the function that writes, the function that copies to the host, and the arguments of the first."""
        if not self.write_buckets:
            return None, None, []
        items = self.write_buckets[0]
        write = partial(write_file, Path(self.checkpoint_dir) / self._name)
        return write, partial(_copied_to_host, items), [torch.distributed.get_rank(), items, self.results_queue]


def write_file(path: Path, rank: int, items: _Items, results: ResultsFile) -> None:
    """Write the items of a rank, and put their places in the file, or the error, into `results`."""
    try:
        with path.open("wb") as stream:
            written = [write_item(stream, in_own_storage(data), item, path.name) for item, data in items]
            os.fsync(stream.fileno())
    except Exception as error:
        results.put(error)
        return
    results.put({rank: written})


def in_own_storage(data: Tensor | BytesIO) -> Tensor | BytesIO:
    """Return the tensor on the host, in a storage with only its elements, because torch.save writes whole storages.

    A contiguous tensor on the host is not copied: its new storage is a view of the same memory.
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
    """Return the items, with copies on the host of the tensors that are on a device or in memory that it reads."""
    return [(item, _pageable(data) if isinstance(data, Tensor) else data) for item, data in items]


def _pageable(tensor: Tensor) -> Tensor:
    """Return the tensor in host memory that a forked process can read, which pinned memory is not."""
    return tensor.clone() if tensor.is_pinned() else tensor.cpu()

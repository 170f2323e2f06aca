"""torch's view of a checkpoint's file, and the queue for the results of megatron-core's checkpoint writers."""

import io
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.utils import _create_file_view


def file_view(file: io.IOBase, offset: int, length: int) -> Any:
    """Return a binary file that holds `length` bytes of `file` from `offset` on."""
    # FileSystemReader reads tensors this way, but only into the caller's tensors (torch 2.13.0).
    return _create_file_view(file, offset, length)


def set_results_queue(results: Any) -> None:
    """Make this process's checkpoint writers put their results into `results`, which has `put` and `get_nowait`."""
    # megatron-core would start a manager process for its queue; no argument changes that (megatron-core 0.16.1).
    filesystem_async._results_queue = results

"""How torch reads a checkpoint's files, and where megatron-core's checkpoint writers leave their results."""

import io
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.utils import _create_file_view


def file_view(file: io.IOBase, offset: int, length: int) -> Any:
    """A binary file that holds `length` bytes of `file` from `offset` on."""
    # FileSystemReader reads a tensor this way, but only into one of the caller's (torch 2.13.0).
    return _create_file_view(file, offset, length)


def set_results_queue(results: Any) -> None:
    """Have the checkpoint writers of this process leave their results in `results`: `put` and `get_nowait`."""
    # megatron-core would start a manager process for it, and offers no other way (megatron-core 0.16.1).
    filesystem_async._results_queue = results

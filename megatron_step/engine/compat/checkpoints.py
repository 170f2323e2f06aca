"""How torch reads and writes a checkpoint's files, and which writer megatron-core takes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view


def file_view(file: io.IOBase, offset: int, length: int) -> Any:
    """Return a binary file that holds `length` bytes of `file` from `offset` on."""
    # FileSystemReader reads tensors this way, but only into the caller's tensors (torch 2.13.0).
    return _create_file_view(file, offset, length)


def write_item(stream: io.IOBase, data: Tensor | io.BytesIO, item: WriteItem, file_name: str) -> WriteResult:
    """Append a tensor to a checkpoint's file, and say where it is."""
    # FileSystemWriter writes a tensor this way, but a whole plan at once (torch 2.13.0).
    transforms = _StorageWriterTransforms()
    return _write_item(transforms, stream, data, item, file_name, SerializationFormat.TORCH_SAVE)


@contextmanager
def writer_class(writer: type) -> Iterator[None]:
    """Within the block megatron-core saves by `writer`, a FileSystemWriterAsync."""
    # TorchDistSaveShardedStrategy makes its writer itself, and takes no other (megatron-core 0.16.1).
    with patch.object(strategy, "FileSystemWriterAsync", writer):
        yield

"""Write a checkpoint of weights only, one tensor at a time, on one process, without a model in memory."""

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from megatron_step.checkpoint.directory import make_partial, publish
from megatron_step.checkpoint.manifest import Manifest, content_files, file_table


def write_streamed(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    description: dict[str, Any],
) -> Path:
    """Write a checkpoint of step 0 into `folder`, and return its path.

    `tensors` has shape and number format by key. `read` is called once for each key, when the tensor is written. At
    most two tensors are in memory: the one that is being written and the one before it. `description` completes the
    manifest. An exception in `read` ends the writing and is raised.
    """
    partial = make_partial(folder, 0)
    placeholders = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a consequence of `no_dist`
        try:
            # One file per tensor: torch's writer frees the tensors of a file when the file is complete.
            writer = FileSystemWriter(partial, single_file_per_rank=False)
            save(placeholders, storage_writer=writer, planner=_ReadWhenWritten(read), no_dist=True)
            # megatron-core expects its name of the format, and an (empty) file for values that are not tensors.
            save_config(CheckpointingConfig("torch_dist", 1), str(partial))
            torch.save({}, partial / "common.pt")
        except (CheckpointException, RuntimeError) as error:
            raise _cause(error, folder) from None
    files = file_table(partial, content_files(partial))
    Manifest(step=0, files=files, **description).write(partial)
    return publish(partial, 0)


def _cause(error: CheckpointException | RuntimeError, folder: Path) -> BaseException:
    """Return the exception of `read` or of the disk, which torch wraps.

    torch reports a full disk as an unexpected position in a file, or as the system's error, which names no file.
    """
    cause: BaseException = error
    if isinstance(error, CheckpointException):
        cause = next(cause for cause, _ in error.failures.values())
    if not isinstance(cause, (RuntimeError, OSError)) or getattr(cause, "filename", None) is not None:
        return cause
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(f"cannot write a checkpoint into {folder}: {str(cause).splitlines()[0]}; {free:,.0f} MiB are free")


class _ReadWhenWritten(DefaultSavePlanner):
    """A planner that saves placeholders, and replaces each by its tensor when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._read(write_item.index.fqn)

"""Find checkpoints, and load them into any parallel layout."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from megatron_step.checkpoint.directory import list_checkpoints
from megatron_step.checkpoint.manifest import DamagedCheckpointError, Manifest, damage, read_manifest
from megatron_step.checkpoint.sharding import in_pieces
from megatron_step.engine.agreement import current_ranks
from megatron_step.engine.parallel import Parallel, first_problem
from megatron_step.model.build import Sharded, sharded_weights
from megatron_step.optim.slices import pieces


@dataclass(frozen=True)
class FoundCheckpoint:
    """A whole checkpoint, and the problems of newer ones."""

    path: Path
    """The checkpoint's folder."""
    manifest: Manifest
    """The checkpoint's manifest."""
    passed_over: list[str]
    """Reasons why newer checkpoints cannot be used, newest first."""


def find_checkpoint(folder: Path, resume: str, parallel: Parallel) -> FoundCheckpoint | None:
    """Find the checkpoint to resume from: "auto" is the newest whole one in `folder`; else `resume` is a path.

    Returns None for "none", and for "auto" if there is no checkpoint. One rank reads each file and compares it with its
    checksum.

    Raises FileNotFoundError if the path does not exist. Raises DamagedCheckpointError if the checkpoint at the path, or
    every checkpoint in `folder`, is damaged.
    """
    if resume == "none":
        return None
    if resume != "auto":
        with current_ranks().together():
            if not Path(resume).is_dir():
                raise FileNotFoundError(f"there is no checkpoint {resume}")
        manifest, problem = _verify(Path(resume), parallel)
        if manifest is None:
            raise DamagedCheckpointError(problem)
        return FoundCheckpoint(Path(resume), manifest, [])
    passed_over: list[str] = []
    saved = current_ranks().from_main(lambda: list_checkpoints(folder))  # the folder may change, so one rank lists it
    for _, path in reversed(saved):
        manifest, problem = _verify(path, parallel)
        if manifest is not None:
            return FoundCheckpoint(path, manifest, passed_over)
        passed_over.append(problem)
    if passed_over:
        raise DamagedCheckpointError(
            f"no checkpoint in {folder} can be used ({'; '.join(passed_over)}): choose another output_dir"
        )
    return None


def find_at(path: Path, parallel: Parallel) -> FoundCheckpoint:
    """Return the checkpoint at `path`, or the newest whole checkpoint of the run whose output folder is `path`.

    Raises ValueError if the run has no checkpoint yet, and the errors of `find_checkpoint`.
    """
    with current_ranks().together():
        if not path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {path}")
    run_folder = path / "checkpoints"
    # The absolute path of a folder called auto or none is not taken for these words.
    found = find_checkpoint(run_folder, "auto" if run_folder.is_dir() else os.path.abspath(path), parallel)
    if found is None:
        raise ValueError(f"{path} has no checkpoint yet: wait until the run has saved one, or name another folder")
    return found


def _verify(path: Path, parallel: Parallel) -> tuple[Manifest | None, str]:
    """Return a checkpoint's manifest if all files are whole; else None and the problem. The same on every rank."""
    try:
        manifest = read_manifest(path)
        problem = damage(path, manifest.files, sorted(manifest.files)[parallel.global_rank :: parallel.world_size])
    except DamagedCheckpointError as error:
        problem = str(error)
    first = first_problem(problem)
    return (manifest, "") if first is None else (None, first)


def load_weights(path: Path, chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
    """Load the weights of a checkpoint of any layout into the chunks, in place.

    Raises ValueError if the checkpoint lacks a tensor, has it in another shape, or holds values that are not finite.
    """
    load_tensors(path, in_pieces(sharded_weights(chunks, parallel)))


def load_tensors(path: Path, requests: Mapping[str, Sharded], shared: bool = False) -> dict[str, Tensor]:
    """Load this rank's shards of the requested tensors into the tensors of `requests`, and return the loaded tensors.

    A ShardedTensor is loaded in place. The parts of a ShardedTensorFactory are joined in a new tensor. At most two
    saved tensors are in memory at once: the one that is being read and the one before it. Set `shared` if several ranks
    request the same shard. Every rank must call this function.

    Raises the errors of `load_weights`, on every rank.
    """
    _check_request(path, requests)
    names = {key: shard.key for key, shard in requests.items()}
    loaded = dist_checkpointing.load(
        {"tensors": dict(requests)},
        str(path),
        validate_access_integrity=not shared,
        strict=StrictHandling.ASSUME_OK_UNEXPECTED,
    )
    tensors: dict[str, Tensor] = loaded.get("tensors", {})
    _check_finite(path, {names[key]: tensor for key, tensor in tensors.items()})
    return tensors


def _check_request(path: Path, requests: Mapping[str, Sharded]) -> None:
    """Raise ValueError, on every rank, if the checkpoint lacks a requested tensor or has it in another shape."""
    problem = first_problem(next(_mismatches(path, requests), None))
    if problem is not None:
        raise ValueError(problem)


def _mismatches(path: Path, requests: Mapping[str, Sharded]) -> Iterator[str]:
    """Describe each requested tensor that the checkpoint lacks or has in another shape."""
    saved = dist_checkpointing.load_tensors_metadata(str(path))
    for shard in requests.values():
        for tensor in pieces(shard):
            if tensor.key not in saved:
                yield f"{path} has no tensor {tensor.key}: it was written by another model or precision"
            elif tuple(saved[tensor.key].global_shape) != tuple(tensor.global_shape):
                shape = list(saved[tensor.key].global_shape)
                yield f"{path} has {tensor.key} in shape {shape}; the model needs {list(tensor.global_shape)}"


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, on every rank, if a loaded tensor holds a value that is not finite."""
    key = first_problem(next((key for key, tensor in tensors.items() if not is_finite(tensor)), None))
    if key is not None:
        raise ValueError(
            f"{path} has infinite or NaN values in {key}: resume from an earlier checkpoint with --resume PATH"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. The sum is checked first because it is much faster."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())

"""Read a checkpoint's tensors whole, one at a time, on one process and without a model.

`dist_checkpointing.load` copies each tensor into a tensor of the caller. Here a tensor that was saved in one piece is
returned as read, without a copy.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_step.checkpoint.load import is_finite
from megatron_step.engine.compat.checkpoints import file_view


class WholeTensors:
    """The tensors of the checkpoint in the folder `path`, which any layout may have written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = FileSystemReader(path).read_metadata()
        self._places = metadata.storage_data
        self._entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.keys = self._entries.keys()
        """Return the names of the tensors."""

    def read(self, key: str) -> Tensor:
        """Read a tensor in the number format in which it was saved.

        Raises ValueError if the tensor is missing or holds values that are not finite.
        """
        if key not in self._entries:
            raise ValueError(f"{self._path} lacks the tensor {key} of its model: use another checkpoint")
        entry = self._entries[key]
        pieces = [(chunk, self._piece(MetadataIndex(key, chunk.offsets))) for chunk in entry.chunks]
        whole = pieces[0][1]
        if len(pieces) > 1:
            whole = torch.empty(entry.size, dtype=entry.properties.dtype)
            for chunk, piece in pieces:
                whole[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes))] = piece
        if not is_finite(whole):
            raise ValueError(f"{self._path} has infinite or NaN values in {key}: use an earlier checkpoint")
        return whole

    def _piece(self, index: MetadataIndex) -> Tensor:
        """Read the shard of a tensor that one rank saved."""
        place = self._places[index]
        with (self._path / place.relative_path).open("rb", buffering=0) as file:
            return torch.load(file_view(file, place.offset, place.length), weights_only=True)

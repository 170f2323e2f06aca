"""A checkpoint's weights, whole and a few at a time, without its model: what little memory an export needs."""

from collections.abc import Sequence

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_step.adapters.merge import add_product
from megatron_step.checkpoint.load import FoundCheckpoint, load_tensors
from megatron_step.growth.weights import adapter_scaling, factor_keys


class SavedWeights:
    """Reads the weights of a checkpoint, whatever layout wrote it. Needs a world, of this one process."""

    def __init__(self, found: FoundCheckpoint) -> None:
        self._path = found.path
        self._scaling = adapter_scaling(found.manifest)
        self._saved = dist_checkpointing.load_tensors_metadata(str(found.path))
        self.adapted = [key for key in self._saved if key.endswith(".weight") and factor_keys(key)[0] in self._saved]
        """Keys of the weights that have an adapter."""

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors, each whole and in the number format in which it was saved.

        Raises ValueError if one is missing, or holds values that are not finite.
        """
        return load_tensors(self._path, {key: self._request(key) for key in keys})

    def read_merged(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The same with adapters merged, W + s B A in fp32; raises as `read` does."""
        factors = {key: factor_keys(key) for key in keys if key in self.adapted}
        tensors = self.read([*keys, *(factor for pair in factors.values() for factor in pair)])
        for key, (a, b) in factors.items():
            whole = ShardedTensor.from_rank_offsets(key, tensors[key].float())
            add_product(whole, tensors[a], tensors[b], self._scaling)
            tensors[key] = whole.data
        return {key: tensors[key] for key in keys}

    def _request(self, key: str) -> ShardedTensor:
        if key not in self._saved:
            raise ValueError(f"{self._path} has no tensor {key}: it holds another model than its manifest says")
        saved = self._saved[key]
        return ShardedTensor.from_rank_offsets(key, torch.empty(saved.global_shape, dtype=saved.dtype))

"""Read a checkpoint's weights, whole and a few at a time, without building the model, to save memory."""

from collections.abc import Sequence

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_step.adapters.merge import add_product
from megatron_step.checkpoint.load import FoundCheckpoint
from megatron_step.checkpoint.whole_tensors import WholeTensors
from megatron_step.growth.weights import adapter_scaling
from megatron_step.plan.names import factor_keys


class SavedWeights:
    """A reader of a checkpoint's weights, for checkpoints of any layout."""

    def __init__(self, found: FoundCheckpoint) -> None:
        self.scaling = adapter_scaling(found.manifest)
        """The factor alpha / rank of the checkpoint's adapters."""
        self._tensors = WholeTensors(found.path)
        keys = self._tensors.keys
        self.adapted = [key for key in keys if key.endswith(".weight") and factor_keys(key)[0] in keys]
        """Keys of the weights that have an adapter."""

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return the named tensors, each whole and in its saved number format.

        Raises ValueError if a tensor is missing, or holds infinite or NaN values.
        """
        return {key: self._tensors.read(key) for key in keys}

    def read_merged(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return the named tensors with adapters merged, W + s B A in fp32.

        Raises ValueError as `read` does.
        """
        return {key: self._merged(key) if key in self.adapted else self._tensors.read(key) for key in keys}

    def _merged(self, key: str) -> Tensor:
        weight, a, b = (self._tensors.read(name) for name in (key, *factor_keys(key)))
        whole = ShardedTensor.from_rank_offsets(key, weight.float())
        add_product(whole, a, b, self.scaling)
        return whole.data

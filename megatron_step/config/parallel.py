"""The parallel layout: how ranks share the model, the data and the optimizer states."""

from dataclasses import dataclass
from typing import Literal

from megatron_step.config.counts import counted
from megatron_step.config.numbers import nearest


@dataclass(frozen=True)
class ParallelConfig:
    """Tensor, sequence, pipeline and data parallelism; the data-parallel size follows from the world size."""

    tensor_parallel_size: int = 1
    """Ranks that each layer's matrices are split over."""
    pipeline_parallel_size: int = 1
    """Ranks that the layers are split over."""
    virtual_pipeline_size: int = 1
    """Model chunks on each pipeline rank (interleaved 1F1B)."""
    sequence_parallel: bool = False
    """Whether norms and residuals are split over the sequence among tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Whether optimizer states are sharded over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Whether the all-reduce of gradients overlaps with the backward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none; selective, the core attention's; full, every layer's."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, not {getattr(self, name)}")
        if self.virtual_pipeline_size > 1 and self.pipeline_parallel_size == 1:
            raise ValueError(
                f"parallel.virtual_pipeline_size {self.virtual_pipeline_size} needs parallel.pipeline_parallel_size "
                "above 1: set parallel.virtual_pipeline_size to 1, or use more pipeline ranks"
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError(
                "parallel.sequence_parallel true needs parallel.tensor_parallel_size above 1: set "
                "parallel.sequence_parallel to false, or use more tensor-parallel ranks"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def _other_worlds(self, world_size: int) -> list[int]:
        size = self.model_parallel_size
        return nearest(world_size, lambda world: world % size == 0) or [size]

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of model copies in a world of `world_size` ranks.

        Raises ValueError if `world_size` is not a multiple of the model-parallel size.
        """
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"a world of {counted(world_size, 'rank')} does not fit parallel.tensor_parallel_size "
                f"{self.tensor_parallel_size} x parallel.pipeline_parallel_size {self.pipeline_parallel_size}: "
                f"start a multiple of {counted(self.model_parallel_size, 'rank')}, such as "
                f"{' or '.join(map(str, self._other_worlds(world_size)))}"
            )
        return world_size // self.model_parallel_size

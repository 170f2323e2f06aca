"""What ranks cost with virtual pipelines, by the layers of their chunks, and how good a split is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChunkCosts:
    """Costs of k kinds that add up over the layers of a chunk and the chunks of a rank; the largest kind counts."""

    sums: Array
    """[k, c, s]: W, what the lowest s layers cost on chunk c."""
    constants: Array
    """[k, p]: d, what a rank costs without layers."""

    @property
    def num_ranks(self) -> int:
        """P."""
        return int(self.constants.shape[1])

    @property
    def num_layers(self) -> int:
        """N."""
        return int(self.sums.shape[2]) - 1

    @cached_property
    def cheapest(self) -> Array:
        """[k, c]: what the cheapest layer costs on chunk c."""
        least: Array = np.diff(self.sums).min(axis=2)
        return least

    def rank_costs(self, ends: Sequence[int]) -> Array:
        """[p]: cost of each rank for chunks that end after `ends` layers."""
        chunks = np.arange(len(ends))
        costs = self.sums[:, chunks, list(ends)] - self.sums[:, chunks, [0, *ends[:-1]]]
        rank_sums = costs.reshape(len(costs), -1, self.num_ranks).sum(axis=1)
        total: Array = (self.constants + rank_sums).max(axis=0)
        return total


@dataclass(frozen=True)
class Split:
    """A split of layers over ranks, or over chunks."""

    cost: float
    """The largest cost of a rank; infinite if no split was found."""
    bound: float
    """No split costs less."""
    layout: tuple[int, ...]
    """Layers of each chunk."""

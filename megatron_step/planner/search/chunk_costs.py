"""Costs of pipeline ranks with virtual pipelines, for any split of a stage's layers over chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChunkCosts:
    """Costs of k kinds, such as memory in training and memory during growth.

    Each kind adds up over the layers of a chunk and over the chunks of a rank. The cost of a rank is that of its
    costliest kind. Chunk c is on rank c mod P.
    """

    sums: Array
    """[k, c, s]: W_c(s), the cost of the lowest s layers if all of them were on chunk c."""
    constants: Array
    """[k, p]: d_p, the cost of rank p without layers."""

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks, P."""
        return int(self.constants.shape[1])

    @property
    def num_layers(self) -> int:
        """Number of layers, N."""
        return int(self.sums.shape[2]) - 1

    @cached_property
    def cheapest(self) -> Array:
        """[k, c]: cost of the cheapest layer on chunk c."""
        cheapest: Array = np.diff(self.sums).min(axis=2)
        return cheapest

    def rank_costs(self, ends: Sequence[int]) -> Array:
        """Return the cost of each rank, [p], if chunk c ends after the lowest `ends[c]` layers."""
        chunks = np.arange(len(ends))
        costs = self.sums[:, chunks, list(ends)] - self.sums[:, chunks, [0, *ends[:-1]]]
        rank_sums = costs.reshape(len(costs), -1, self.num_ranks).sum(axis=1)
        total: Array = (self.constants + rank_sums).max(axis=0)
        return total


@dataclass(frozen=True)
class Split:
    """A split of layers over ranks, or over chunks."""

    cost: float
    """Cost of the costliest rank; infinite if no split was found."""
    bound: float
    """Lower bound of the cost of any split."""
    layout: tuple[int, ...]
    """Number of layers of each chunk (without virtual pipelines, of each rank)."""

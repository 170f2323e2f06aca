"""Costs of chunks on a rank, computed by hand."""

import numpy as np

from megatron_step.planner.search.chunk_costs import ChunkCosts

# Layers cost 1, 2, 3, 4, 5 on every chunk; chunks 0 and 2 are on rank 0, chunks 1 and 3 on rank 1.
SUMS = np.tile([0.0, 1, 3, 6, 10, 15], (1, 4, 1))


def test_costs_of_ranks_are_those_of_their_chunks() -> None:
    costs = ChunkCosts(SUMS, np.array([[100.0, 200.0]]))
    assert costs.rank_costs([1, 2, 4, 5]).tolist() == [100 + 1 + 7, 200 + 2 + 5]
    assert (costs.num_ranks, costs.num_layers) == (2, 5)


def test_the_largest_kind_counts() -> None:
    costs = ChunkCosts(np.concatenate([SUMS, 2 * SUMS]), np.array([[100.0, 200.0], [90.0, 197.0]]))
    assert costs.rank_costs([1, 2, 4, 5]).tolist() == [max(100 + 8, 90 + 16), max(200 + 7, 197 + 14)]
    assert costs.cheapest.tolist() == [[1.0] * 4, [2.0] * 4]

"""Splits over virtual pipeline chunks are what trying all splits finds, or within their bound."""

from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.planner.search import interleaved
from megatron_step.planner.search.chunk_costs import ChunkCosts
from megatron_step.planner.search.interleaved import interleaved_split, near_split


def random_costs(seed: int, num_ranks: int, num_chunks: int, num_layers: int) -> ChunkCosts:
    """A cluster with two kinds of machines."""
    random = np.random.default_rng(seed)
    of_layers = np.where(random.random((2, 1, num_layers)) < 0.5, 16.0, 4.0)
    factors = random.integers(1, 3, (2, num_chunks))[:, :, None]
    sums = np.concatenate([np.zeros((2, num_chunks, 1)), np.cumsum(factors * of_layers, axis=2)], axis=2)
    return ChunkCosts(sums, random.integers(0, 30, (2, num_ranks)).astype(float))


def all_splits(num_layers: int, num_chunks: int) -> list[tuple[int, ...]]:
    return [(*inner, num_layers) for inner in combinations(range(1, num_layers), num_chunks - 1)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(2, 3), virtual=st.integers(2, 3), spare=st.integers(0, 4))
def test_the_same_as_trying_all(seed: int, num_ranks: int, virtual: int, spare: int) -> None:
    num_chunks = num_ranks * virtual
    num_layers = num_chunks + spare
    costs = random_costs(seed, num_ranks, num_chunks, num_layers)
    found = interleaved_split(costs, seconds=30)
    best = min(costs.rank_costs(ends).max() for ends in all_splits(num_layers, num_chunks))
    assert found.cost == pytest.approx(best, rel=1e-9)
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert costs.rank_costs(np.cumsum(found.layout).tolist()).max() == found.cost
    assert best * (1 - 1e-12) <= near_split(costs).cost


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), slack=st.floats(0, 0.5))
def test_other_costs_stay_within_their_limit(seed: int, slack: float) -> None:
    costs, other = random_costs(seed, 2, 4, 8), random_costs(seed + 1, 2, 4, 8)
    limit = min(other.rank_costs(ends).max() for ends in all_splits(8, 4)) * (1 + slack)
    start = np.diff([0, *min(all_splits(8, 4), key=lambda ends: other.rank_costs(ends).max())]).tolist()
    found = near_split(costs, [(other, limit)], start)
    assert other.rank_costs(np.cumsum(found.layout).tolist()).max() <= limit * (1 + 1e-9)
    assert found.cost <= costs.rank_costs(np.cumsum(start).tolist()).max()


def test_no_split_keeps_the_limit() -> None:
    costs = random_costs(1, 2, 4, 8)
    assert near_split(costs, [(costs, 1.0)]).layout == ()


def new_at_the_top(num_ranks: int, num_chunks: int) -> ChunkCosts:
    """126 layers, fewer micro-batches in flight the higher a chunk is."""
    of_layers = np.array([3.6] * 94 + [16.0] * 32) + np.linspace(20, 1, num_chunks)[:, None]
    sums = np.concatenate([np.zeros((num_chunks, 1)), np.cumsum(of_layers, axis=1)], axis=1)
    return ChunkCosts(sums[None], np.array([[30.0, *[0.0] * (num_ranks - 2), 30.0]]))


def test_when_time_is_up_the_bound_is_below_what_was_found() -> None:
    found = interleaved_split(new_at_the_top(6, 18), seconds=0.5)
    assert 0 < found.bound <= found.cost < 400
    assert sum(found.layout) == 126


def test_two_chunks_on_each_rank_take_no_program() -> None:
    with patch.object(interleaved, "new_model", side_effect=AssertionError):
        found = interleaved_split(new_at_the_top(16, 32), seconds=1)
    assert found.cost == pytest.approx(found.bound, rel=1e-9)
    assert sum(found.layout) == 126

"""Splits over virtual pipeline chunks are what trying all splits finds, or within their bound."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.planner.interleaved import ChunkCosts, interleaved_split, near_split


def random_costs(seed: int, num_ranks: int, num_chunks: int, num_layers: int) -> ChunkCosts:
    random = np.random.default_rng(seed)
    of_layers = np.where(random.random(num_layers) < 0.5, 16.0, 4.0)
    factors = random.integers(1, 3, num_chunks)[:, None]
    sums = np.concatenate([np.zeros((num_chunks, 1)), np.cumsum(factors * of_layers, axis=1)], axis=1)
    return ChunkCosts(sums, random.integers(0, 30, num_ranks).astype(float))


def all_splits(num_layers: int, num_chunks: int) -> list[tuple[int, ...]]:
    return [(*inner, num_layers) for inner in combinations(range(1, num_layers), num_chunks - 1)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(2, 3), virtual=st.integers(2, 3), spare=st.integers(0, 4))
def test_the_same_as_trying_all(seed: int, num_ranks: int, virtual: int, spare: int) -> None:
    num_chunks = num_ranks * virtual
    num_layers = num_chunks + spare
    costs = random_costs(seed, num_ranks, num_chunks, num_layers)
    found = interleaved_split(costs, seconds=30)
    best = min(costs.of(ends).max() for ends in all_splits(num_layers, num_chunks))
    assert found.cost == pytest.approx(best, rel=1e-9)
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert costs.of(np.cumsum(found.layout).tolist()).max() == found.cost
    assert best * (1 - 1e-12) <= near_split(costs).cost


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), slack=st.floats(0, 0.5))
def test_other_costs_stay_within_their_limit(seed: int, slack: float) -> None:
    costs, other = random_costs(seed, 2, 4, 8), random_costs(seed + 1, 2, 4, 8)
    limit = min(other.of(ends).max() for ends in all_splits(8, 4)) * (1 + slack)
    start = np.diff([0, *min(all_splits(8, 4), key=lambda ends: other.of(ends).max())]).tolist()
    found = near_split(costs, [(other, limit)], start)
    assert other.of(np.cumsum(found.layout).tolist()).max() <= limit * (1 + 1e-9)
    assert found.cost <= costs.of(np.cumsum(start).tolist()).max()


def test_no_split_keeps_the_limit() -> None:
    costs = random_costs(1, 2, 4, 8)
    assert near_split(costs, [(costs, 1.0)]).layout == ()


def test_costs_of_ranks_are_those_of_their_chunks() -> None:
    # Layers cost 1, 2, 3, 4, 5 on every chunk; chunks 0 and 2 are on rank 0, chunks 1 and 3 on rank 1.
    sums = np.tile([0.0, 1, 3, 6, 10, 15], (4, 1))
    assert ChunkCosts(sums, np.array([100.0, 200.0])).of([1, 2, 4, 5]).tolist() == [100 + 1 + 7, 200 + 2 + 5]


def test_when_time_is_up_the_bound_is_below_what_was_found() -> None:
    """Sixteen ranks with two chunks each, new layers at the top."""
    of_layers = np.array([3.6] * 94 + [16.0] * 32)
    sums = np.tile(np.concatenate([[0.0], np.cumsum(of_layers)]), (32, 1))
    costs = ChunkCosts(sums, np.array([30.0, *[0.0] * 14, 30.0]))
    found = interleaved_split(costs, seconds=1)
    assert 0.8 * found.cost < found.bound <= found.cost < 70
    assert sum(found.layout) == 126

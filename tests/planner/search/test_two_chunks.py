"""The program's bound is below all splits, and what trying all of them finds but for chunks of a single layer."""

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.planner.search.chunk_costs import ChunkCosts
from megatron_step.planner.search.two_chunks import two_chunk_split


def random_costs(seed: int, num_ranks: int, num_layers: int, kinds: tuple[float, float]) -> ChunkCosts:
    random = np.random.default_rng(seed)
    return costs_of(np.where(random.random(num_layers) < 0.5, *kinds), num_ranks, random)


def costs_of(of_layers: npt.NDArray[np.float64], num_ranks: int, random: np.random.Generator) -> ChunkCosts:
    factors = random.integers(1, 4, (2, 2 * num_ranks, 1))
    sums = np.concatenate([np.zeros((2, 2 * num_ranks, 1)), np.cumsum(factors * of_layers, axis=2)], axis=2)
    return ChunkCosts(sums, random.integers(0, 30, (2, num_ranks)).astype(float))


def best_of_all(costs: ChunkCosts, num_chunks: int) -> float:
    inner = combinations(range(1, costs.num_layers), num_chunks - 1)
    return min(float(costs.rank_costs([*ends, costs.num_layers]).max()) for ends in inner)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 3), spare=st.integers(0, 7), equal=st.booleans())
def test_the_bound_is_below_all_splits(seed: int, num_ranks: int, spare: int, equal: bool) -> None:
    num_layers = 2 * num_ranks + spare
    costs = random_costs(seed, num_ranks, num_layers, (8.0, 8.0) if equal else (16.0, 4.0))
    start = [*range(1, 2 * num_ranks), num_layers]
    bound, ends = two_chunk_split(costs, start, 1e-10)
    best = best_of_all(costs, 2 * num_ranks)
    assert bound <= best * (1 + 1e-12)
    assert len(ends) == 2 * num_ranks and ends[-1] == num_layers and min(np.diff([0, *ends])) >= 1
    if equal:
        assert bound == pytest.approx(best, rel=1e-9)
        assert costs.rank_costs(ends).max() == pytest.approx(best, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 3), spare=st.integers(0, 5), more=st.integers(1, 3))
def test_the_bound_is_below_all_splits_of_more_layers(seed: int, num_ranks: int, spare: int, more: int) -> None:
    """Wherever they are put in; both kinds of layers are there before."""
    random, num_chunks = np.random.default_rng(seed), 2 * num_ranks
    layers = random.permutation([16.0, 4.0, *random.choice([16.0, 4.0], num_chunks - 2 + spare)])
    places = random.integers(0, len(layers) + 1, more)
    longer = np.insert(layers, places, random.choice([16.0, 4.0], more))
    costs, of_longer = (costs_of(of, num_ranks, np.random.default_rng(seed)) for of in (layers, longer))
    bound, _ = two_chunk_split(costs, [*range(1, num_chunks), len(layers)], 1e-10)
    assert bound <= best_of_all(of_longer, num_chunks) * (1 + 1e-12)


def test_nothing_is_better_than_the_best() -> None:
    costs = random_costs(1, 2, 9, (8.0, 8.0))
    _, best = two_chunk_split(costs, [1, 2, 3, 9], 1e-10)
    assert two_chunk_split(costs, best, 1e-10)[1] == best

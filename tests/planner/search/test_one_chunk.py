"""The best split is what trying all splits finds."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.planner.search.one_chunk import best_split


def largest(costs: np.ndarray, ends: tuple[int, ...]) -> float:
    return max(costs[rank, start, end] for rank, (start, end) in enumerate(zip((0, *ends), ends)))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 4), spare=st.integers(0, 6))
def test_the_same_as_trying_all(seed: int, num_ranks: int, spare: int) -> None:
    num_layers = num_ranks + spare
    costs = np.random.default_rng(seed).integers(1, 50, (num_ranks, num_layers + 1, num_layers + 1)).astype(float)
    costs[:, np.tri(num_layers + 1, dtype=bool)] = np.inf
    cost, layout = best_split(costs)
    tried = [(*inner, num_layers) for inner in combinations(range(1, num_layers), num_ranks - 1)]
    assert cost == min(largest(costs, ends) for ends in tried)
    assert largest(costs, tuple(np.cumsum(layout))) == cost


def test_nothing_fits() -> None:
    assert best_split(np.full((2, 4, 4), np.inf)) == (np.inf, ())


@pytest.mark.parametrize("num_layers", [1, 2])
def test_fewer_layers_than_ranks(num_layers: int) -> None:
    costs = np.ones((3, num_layers + 1, num_layers + 1))
    costs[:, np.tri(num_layers + 1, dtype=bool)] = np.inf
    assert best_split(costs)[1] == ()

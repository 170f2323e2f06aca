"""The depths that dynamic programming finds are the best of all."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.planner.depths import best_depths, growths


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), spare=st.integers(0, 5), largest=st.booleans())
def test_the_same_as_trying_all(seed: int, count: int, spare: int, largest: bool) -> None:
    depth = count + spare
    costs = np.random.default_rng(seed).integers(0, 30, (count, depth + 1, depth + 1)).astype(float)
    costs[0, 1:] = np.inf
    costs[1:, 0] = np.inf
    costs[:, np.tri(depth + 1, dtype=bool)] = np.inf

    def total(depths: tuple[int, ...]) -> float:
        of_stages = [costs[i][growth] for i, growth in enumerate(growths(depths))]
        return max(of_stages) if largest else sum(of_stages)

    value, depths = best_depths(list(costs), largest=largest)
    assert value == min(total((*inner, depth)) for inner in combinations(range(1, depth), count - 1))
    assert total(depths) == value


def test_no_path() -> None:
    assert best_depths([np.full((3, 3), np.inf)], largest=True) == (np.inf, ())


def test_growths() -> None:
    assert growths((4, 6, 7)) == [(0, 4), (4, 6), (6, 7)]

"""The integer program finds what dynamic programming finds."""

from unittest.mock import patch

import mip
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.planner.search.depths import best_depths, growths
from megatron_step.planner.search.program import solve_program


def random_costs(seed: int, count: int, depth: int) -> list[np.ndarray]:
    costs = np.random.default_rng(seed).integers(0, 30, (count, depth + 1, depth + 1)).astype(float)
    costs[0, 1:] = np.inf
    costs[1:, 0] = np.inf
    costs[:, np.tri(depth + 1, dtype=bool)] = np.inf
    return list(costs)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), spare=st.integers(0, 5), largest=st.booleans())
def test_the_same_as_dynamic_programming(seed: int, count: int, spare: int, largest: bool) -> None:
    costs = random_costs(seed, count, count + spare)
    least, _ = best_depths(costs, largest=largest)
    depths = solve_program(costs, largest=largest)
    of_stages = [cost[growth] for cost, growth in zip(costs, growths(depths))]
    assert (max(of_stages) if largest else sum(of_stages)) == least
    if largest:
        within = solve_program(costs, largest=True, limit=least)
        assert max(cost[growth] for cost, growth in zip(costs, growths(within))) == least


def test_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    solve_program(random_costs(1, 3, 8), largest=True)
    assert capfd.readouterr() == ("", "")


def test_an_answer_that_is_not_the_optimum_is_refused() -> None:
    with (
        patch.object(mip.Model, "optimize", return_value=mip.OptimizationStatus.ERROR),
        pytest.raises(RuntimeError, match="did not find the layers of the stages: ERROR"),
    ):
        solve_program(random_costs(1, 3, 8), largest=True)

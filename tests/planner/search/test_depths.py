"""The depths are those that exhaustive search finds, as good as their bound says, also on hard instances."""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.planner.search.depths import Depths, best_depths, cheapest_depths, growths
from megatron_step.planner.search.one_chunk import best_split

# d 1024, L 24, d_ff 2736; LoRA of rank 128 on all seven linears of Llama, as the paper counts.
LAYER = 4 * 1024**2 + 3 * 1024 * 2736 + 2 * 1024
LORA = 128 * (8 * 1024 + 3 * (1024 + 2736))
NEW = 16 * LAYER
OLD = 2 * LAYER + 16 * LORA
EMBEDDINGS = 16 * 2 * 32000 * 1024

Pattern = Callable[[int, int], list[bool]]
"""Which of a stage's layers are new, by the layers before and after it."""


def at_top(before: int, after: int) -> list[bool]:
    return [False] * before + [True] * (after - before)


def at_bottom(before: int, after: int) -> list[bool]:
    return at_top(before, after)[::-1]


def in_middle(before: int, after: int) -> list[bool]:
    return [False] * (before // 2) + [True] * (after - before) + [False] * (before - before // 2)


def by_turns(before: int, after: int) -> list[bool]:
    pairs = min(before, after - before)
    return [False] * (before - pairs) + [True, False] * pairs + [True] * (after - before - pairs)


class Instance:
    """Ranks with capacities, layers that take `new` or `old` bytes, and what ranks have beside them."""

    def __init__(
        self,
        num_layers: int,
        new: float,
        old: float,
        rest: Sequence[float],
        capacities: Sequence[float],
        where: Pattern,
    ) -> None:
        self.num_layers, self.where, self.new, self.old = num_layers, where, new, old
        self.rest, self.capacities = np.array(rest, float), np.array(capacities, float)
        self.evaluated = 0

    def costs(self, before: int, after: int) -> np.ndarray:
        """[p, x, y]"""
        is_new = self.where(before, after) if before else [True] * after
        sums = np.concatenate([[0.0], np.cumsum(np.where(is_new, self.new, self.old))])
        ends = np.arange(after + 1)
        used = self.rest[:, None, None] + (sums[None, :] - sums[:, None])[None]
        return np.where((ends[:, None] < ends)[None], used / self.capacities[:, None, None], np.inf)

    def evaluate(self, _: int, before: int, after: int) -> tuple[float, float]:
        self.evaluated += 1
        cost, _layout = best_split(self.costs(before, after))
        return cost, cost

    def bounds(self, count: int) -> list[np.ndarray]:
        before, after = np.meshgrid(np.arange(self.num_layers + 1.0), np.arange(self.num_layers + 1.0), indexing="ij")
        everything = self.rest.sum() + self.new * (after - before) + self.old * before
        alone = ((self.rest + min(self.new, self.old)) / self.capacities).max()
        bound = np.maximum(everything / self.capacities.sum(), alone)
        ranks = len(self.rest)
        bound[(after <= before) | (after < ranks) | ((before > 0) & (before < ranks))] = np.inf
        return [np.where(before == 0 if i == 0 else before > 0, bound, np.inf) for i in range(count)]

    def solve(self, count: int) -> Depths:
        return cheapest_depths(self.bounds(count), self.evaluate, largest=True)

    def exhaustive(self, count: int) -> float:
        """The least largest share over all depths and all layouts."""
        shares = {}
        for before in range(self.num_layers):
            for after in range(before + 1, self.num_layers + 1):
                costs = self.costs(before, after)
                splits = combinations(range(1, after), len(self.rest) - 1)
                shares[before, after] = min(
                    (
                        max(
                            costs[rank, start, end] for rank, (start, end) in enumerate(zip((0, *ends), (*ends, after)))
                        )
                        for ends in splits
                    ),
                    default=np.inf,
                )
        paths = [(*inner, self.num_layers) for inner in combinations(range(1, self.num_layers), count - 1)]
        return min(max(shares[growth] for growth in growths(path)) for path in paths)


@settings(max_examples=500, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    count=st.integers(1, 4),
    spare=st.integers(0, 5),
    new=st.integers(1, 100),
    old=st.integers(0, 100),
    rest=st.lists(st.integers(0, 300), min_size=4, max_size=4),
    capacities=st.lists(st.integers(20, 100), min_size=4, max_size=4),
    where=st.sampled_from([at_top, at_bottom, in_middle, by_turns]),
)
def test_the_same_as_exhaustive_search(
    num_ranks: int, count: int, spare: int, new: int, old: int, rest: list[int], capacities: list[int], where: Pattern
) -> None:
    num_layers = min(num_ranks + count - 1 + spare, 12)
    instance = Instance(num_layers, new, old, rest[:num_ranks], capacities[:num_ranks], where)
    found = instance.solve(count)
    assert found.is_optimal
    assert found.cost == pytest.approx(instance.exhaustive(count), rel=1e-12)
    shares = [instance.evaluate(0, *growth)[0] for growth in growths(found.depths)]
    assert max(shares) == pytest.approx(found.cost, rel=1e-12)
    # All bytes of the last stage's cheapest case, over all memory.
    assert found.cost >= (sum(rest[:num_ranks]) + num_layers * min(new, old)) / sum(capacities[:num_ranks]) * (
        1 - 1e-12
    )


@pytest.mark.parametrize(("count", "layers"), [(2, (14, 10)), (3, (11, 8, 5))])
@pytest.mark.parametrize("rest", [0, EMBEDDINGS])
def test_the_worked_values_of_the_paper(count: int, layers: tuple[int, ...], rest: int) -> None:
    found = Instance(24, NEW, OLD, [rest], [1], at_top).solve(count)
    assert tuple(np.diff([0, *found.depths])) == layers


@pytest.mark.parametrize(
    ("count", "rest", "saving"), [(2, 0, 0.395), (3, 0, 0.519), (2, EMBEDDINGS, 0.325), (3, EMBEDDINGS, 0.426)]
)
def test_the_worked_savings(count: int, rest: int, saving: float) -> None:
    found = Instance(24, NEW, OLD, [rest], [1], at_top).solve(count)
    assert 1 - found.cost / (24 * NEW + rest) == pytest.approx(saving, abs=5e-4)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_integer_solution_beats_the_continuous_one(count: int) -> None:
    share = OLD / NEW  # a = 1/8 + E / P
    bound = share / (1 - (1 - share) ** count)
    found = Instance(24, NEW, OLD, [0], [1], at_top).solve(count)
    assert bound <= found.cost / (24 * NEW) <= bound * 1.1


def test_an_instance_on_which_an_integer_program_fails() -> None:
    """126 layers on 16 ranks in 4 stages: branching on integers alone gets no further than 69.6 in a minute."""
    instance = Instance(126, 16, 3.6, [30, *[0] * 14, 30], [1] * 16, at_top)
    found = instance.solve(4)
    assert found.cost == pytest.approx(50.4, rel=1e-12)
    assert found.is_optimal
    assert instance.evaluated < 500  # of 8,001 stages


@pytest.mark.parametrize("capacities", [[1.0] * 64, [1.0] * 32 + [0.5] * 32])
def test_many_ranks(capacities: list[float]) -> None:
    found = Instance(126, 16, 3.6, [30, *[0] * 62, 30], capacities, at_top).solve(4)
    assert found.is_optimal


def test_a_sum_of_costs() -> None:
    costs = [np.full((4, 4), np.inf) for _ in range(2)]
    costs[0][0, 1], costs[0][0, 2], costs[1][1, 3], costs[1][2, 3] = 5.0, 1.0, 1.0, 4.5
    found = cheapest_depths(costs, lambda i, m, n: (costs[i][m, n],) * 2, largest=False)
    assert found == Depths((2, 3), 5.5, 5.5)


def test_costs_above_their_bounds_are_not_settled_for() -> None:
    """The path that looks best costs more than another one."""
    bounds = [np.full((4, 4), np.inf) for _ in range(2)]
    bounds[0][0, 1], bounds[0][0, 2], bounds[1][1, 3], bounds[1][2, 3] = 1.0, 2.0, 1.0, 2.0
    found = cheapest_depths(bounds, lambda i, m, n: (9.0, 9.0) if m == 0 and n == 1 else (2.5, 2.5), largest=True)
    assert found == Depths((2, 3), 2.5, 2.5)


def test_at_the_deadline_the_gap_is_said() -> None:
    bounds = [np.full((4, 4), np.inf) for _ in range(2)]
    bounds[0][0, 1], bounds[0][0, 2], bounds[1][1, 3], bounds[1][2, 3] = 1.0, 2.0, 1.0, 2.0
    found = cheapest_depths(bounds, lambda i, m, n: (9.0, 3.0), largest=True, start=(1, 3), deadline=0.0)
    assert found == Depths((1, 3), 9.0, 2.0)
    assert not found.is_optimal


def test_nothing_is_possible() -> None:
    found = cheapest_depths([np.full((3, 3), np.inf)], lambda i, m, n: (1.0, 1.0), largest=True)
    assert found.depths == ()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), spare=st.integers(0, 5), largest=st.booleans())
def test_known_costs_give_the_best_of_all_paths(seed: int, count: int, spare: int, largest: bool) -> None:
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

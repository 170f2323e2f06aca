import pytest
import torch

from benchmarks.world import in_world


def test_results_are_in_the_order_of_ranks() -> None:
    assert in_world(2, rank_and, 5) == [(0, 5), (1, 5)]


def test_a_rank_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="a world of 1 ranks failed"):
        in_world(1, fail)


# What the ranks run.


def rank_and(number: int) -> tuple[int, int]:
    return torch.distributed.get_rank(), number


def fail() -> None:
    raise ValueError("as asked")

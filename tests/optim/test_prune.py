"""The smallest moments become zero, the same ones however they are spread over ranks."""

import pytest
import torch
from torch import Tensor
from worlds import Worlds

from megatron_step.engine.parallel import start_world
from megatron_step.optim.prune import prune_moments

Pair = tuple[Tensor, Tensor]


def prune(moments: list[Pair], share: float, groups: list) -> float:
    """Prune moments that are stored in fp32."""
    return prune_moments([(first, [first, second]) for first, second in moments], share, groups)


def _moments() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (scale * torch.randn(size, generator=generator), torch.rand(size, generator=generator) + 0.1)
        for scale, size in ((1.0, (40, 10)), (1e-6, (101,)), (1e3, (7, 3)))
    ]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_each_tensor_loses_the_share_that_is_smallest(share: float) -> None:
    before, moments = _moments(), _moments()
    zeros = prune(moments, share, [])
    for (first, second), (old_first, old_second) in zip(moments, before):
        count = int(share * first.numel())
        smallest = old_first.abs().flatten().argsort()[:count]
        expected = torch.zeros(first.numel(), dtype=torch.bool)
        expected[smallest] = True
        assert torch.equal((first == 0).flatten(), expected)
        assert torch.equal((second == 0).flatten(), expected), "the second moment goes with the first"
        assert torch.equal(first[first != 0], old_first[first != 0])
        assert torch.equal(second[second != 0], old_second[second != 0])
    assert zeros == pytest.approx(share, abs=0.02)


def test_of_equal_elements_none_or_all_go() -> None:
    first = torch.tensor([1.0, 1.0, 1.0, 2.0])
    prune([(first, torch.ones(4))], 0.5, [])
    assert first.tolist() == [0.0, 0.0, 0.0, 2.0]


def test_neighbouring_numbers_are_told_apart() -> None:
    first = 1.0 + torch.arange(8) * torch.finfo(torch.float32).eps
    prune([(first, torch.ones(8))], 0.625, [])
    assert (first == 0).tolist() == [True] * 5 + [False] * 3


def test_nothing_to_prune() -> None:
    assert prune([], 0.9, []) == 0.0
    assert prune([(torch.empty(0), torch.empty(0))], 0.9, []) == 0.0


def test_ranks_zero_what_one_process_zeroes(worlds: Worlds) -> None:
    expected = _moments()
    share = prune(expected, 0.8, [])
    ranks = worlds(2).run(prune_halves)
    assert [zeros for zeros, _ in ranks] == pytest.approx([share, share])
    for index, pair in enumerate(expected):
        for part in range(2):
            whole = torch.cat([parts[index][part] for _, parts in ranks])
            assert torch.equal(whole, pair[part].flatten())


def prune_halves() -> tuple[float, list[tuple[Tensor, Tensor]]]:
    """Each rank holds another part of every tensor; of the last, one holds nothing."""
    start_world()
    rank, parts = torch.distributed.get_rank(), []
    for index, (first, second) in enumerate(_moments()):
        cut = 0 if index == 2 else first.numel() // 3
        own = slice(0, cut) if rank == 0 else slice(cut, None)
        parts.append((first.flatten()[own].clone(), second.flatten()[own].clone()))
    return prune(parts, 0.8, [torch.distributed.group.WORLD]), parts

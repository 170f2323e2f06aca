"""Parts of the sequence and of an adapter's rank come together and apart as they should."""

import torch
from torch import Tensor
from worlds import Worlds

from megatron_step.engine.parallel import start_world
from megatron_step.layers.communication import all_gather, all_gather_last, reduce_scatter, reduce_scatter_last

SHAPE = (6, 2, 4)


def _of_rank(rank: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def test_parts_of_the_sequence(worlds: Worlds) -> None:
    tensors = [_of_rank(rank) for rank in range(2)]
    for rank, found in enumerate(worlds(2).run(exchange)):
        assert torch.equal(found["gathered"], torch.cat(tensors))
        torch.testing.assert_close(found["scattered"], sum(tensors)[3 * rank : 3 * rank + 3])


def test_parts_of_the_last_dimension(worlds: Worlds) -> None:
    tensors = [_of_rank(rank) for rank in range(2)]
    for rank, found in enumerate(worlds(2).run(exchange)):
        assert torch.equal(found["gathered last"], torch.cat(tensors, -1))
        torch.testing.assert_close(found["scattered last"], sum(tensors)[..., 2 * rank : 2 * rank + 2])


def test_one_rank_has_all(worlds: Worlds) -> None:
    (found,) = worlds(1).run(exchange)
    assert torch.equal(found["gathered last"], _of_rank(0))
    assert torch.equal(found["scattered last"], _of_rank(0))


def exchange() -> dict[str, Tensor]:
    """Return what every rank has after each kind of exchange."""
    start_world()
    group = torch.distributed.group.WORLD
    x = _of_rank(torch.distributed.get_rank())
    later, work = all_gather(x, group, asynchronous=True)
    assert work is not None
    work.wait()
    gathered, _ = all_gather(x, group)
    assert torch.equal(later, gathered)
    scattered, work = reduce_scatter(x, group)
    work.wait()
    return {
        "gathered": gathered,
        "scattered": scattered,
        "gathered last": all_gather_last(x, group),
        "scattered last": reduce_scatter_last(x, group),
    }

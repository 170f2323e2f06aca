"""Linears with adapters, split over ranks, give the outputs and every gradient of the whole ones."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from worlds import Worlds

from megatron_step import ops
from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.microbatch_seed import set_microbatch_seed
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.layers.adapter import Adapter, adapter_linear

RANK, ALPHA, DROPOUT = 4, 12.0, 0.25
NAMES = ("x", "w1", "a1", "b1", "w2", "a2", "b2")


def _whole() -> dict[str, Tensor]:
    """x [s, b, h]; W [f, h], A [r, h] and B [f, r] of a column-parallel linear; the same of a row-parallel one."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((6, 2, 8), (12, 8), (RANK, 8), (12, RANK), (8, 12), (RANK, 12), (8, RANK), (6, 2, 8))
    return {name: torch.randn(shape, generator=generator) for name, shape in zip((*NAMES, "grad"), shapes)}


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_column_and_a_row_linear_are_two_whole_ones(worlds: Worlds, sequence_parallel: bool) -> None:
    (expected,) = worlds(1).run(column_then_row, parallel={})
    layout = {"tensor_parallel_size": 2, "sequence_parallel": sequence_parallel}
    ranks = worlds(2).run(column_then_row, parallel=layout)
    for name, axis in {"x": 0, "y": 0}.items():
        if sequence_parallel:
            assert_same(torch.cat([rank[name] for rank in ranks], axis), expected[name])
        else:
            for rank in ranks:
                assert_same(rank[name], expected[name])
    for name, axis in {"a1": 0, "b1": 0, "a2": 1, "b2": 1}.items():
        assert_same(torch.cat([rank[name] for rank in ranks], axis), expected[name])


def test_one_process_is_the_formula(worlds: Worlds) -> None:
    (found,) = worlds(1).run(column_then_row, parallel={})
    whole = {name: tensor.requires_grad_() for name, tensor in _whole().items()}
    y = whole["x"]
    for number, width in (("1", 8), ("2", 12)):
        seed = (5 * 0x9E3779B1 + int(number) * 0x85EBCA77) % (1 << 62)
        mask = ops.dropout_mask(y.shape, ops.AdapterDropout(DROPOUT, seed, 0, width))
        adapted = F.linear(F.linear(y * mask, whole[f"a{number}"]), whole[f"b{number}"])
        y = F.linear(y, whole[f"w{number}"]) + ALPHA / RANK * adapted
    y.backward(whole["grad"].detach())
    assert_same(found["y"], y.detach())
    for name in ("x", "a1", "b1", "a2", "b2"):
        assert_same(found[name], whole[name].grad)


def test_a_micro_batch_has_its_own_mask_and_evaluation_none(alone: Parallel) -> None:
    adapter = _adapter("column", torch.randn(12, 8), alone, site=1)
    set_microbatch_seed(1)
    first, again = adapter.draw_dropout(), adapter.draw_dropout()
    set_microbatch_seed(2)
    assert first == again != adapter.draw_dropout()
    adapter.eval()
    assert adapter.draw_dropout() is None


def test_gradients_are_added_to_main_grad_unrounded(alone: Parallel) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(12, 8).bfloat16(), torch.randn(6, 2, 8).bfloat16()
    adapter = _adapter("column", weight, alone, site=1)
    factors = [adapter.linear_in.weight, adapter.linear_out.weight]
    for factor in factors:
        torch.nn.init.normal_(factor)
        factor.main_grad = torch.ones(factor.shape)
    set_microbatch_seed(1)
    for _ in range(2):
        adapter_linear(x, weight, None, adapter).float().square().sum().backward()
    twice = [factor.main_grad - 1 for factor in factors]
    for factor in factors:
        assert factor.grad_added_to_main_grad
        assert not factor.grad.any()
        del factor.main_grad
        factor.grad = None
    adapter_linear(x, weight, None, adapter).float().square().sum().backward()
    for factor, sums in zip(factors, twice):
        torch.testing.assert_close(sums, 2 * factor.grad.float(), rtol=2**-7, atol=1e-2)


def test_a_rank_that_cannot_be_split_is_refused(worlds: Worlds) -> None:
    assert all("rank 3 is not divisible by 2" in message for message in worlds(2).run(odd_rank))


# What the ranks run.


def column_then_row(parallel: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every A and B."""
    with parallel_layout(ParallelConfig(**parallel), seed=1) as place:
        set_microbatch_seed(5)
        group, sequence = place.groups.tp, place.config.sequence_parallel
        whole = _whole()
        own = {
            name: whole[name].chunk(group.size(), 0)[group.rank()].clone() for name in ("x", "w1", "a1", "b1", "grad")
        }
        own |= {name: whole[name].chunk(group.size(), 1)[group.rank()].clone() for name in ("w2", "a2", "b2")}
        if not sequence:
            own |= {"x": whole["x"], "grad": whole["grad"]}
        x = own["x"].requires_grad_()
        column, row = _filled("column", own, "1", place), _filled("row", own, "2", place)
        sums = not sequence and group.size() > 1
        hidden = adapter_linear(x, own["w1"], None, column, reduce_input_gradient=sums, gather_sequence=sequence)
        partial = adapter_linear(hidden, own["w2"], None, row)
        reduce = reduce_scatter_to_sequence_parallel_region if sequence else reduce_from_tensor_model_parallel_region
        y = reduce(partial, group=group)
        y.backward(own["grad"])
        factors = {"a1": column.linear_in, "b1": column.linear_out, "a2": row.linear_in, "b2": row.linear_out}
        return {"y": y.detach(), "x": x.grad, **{name: factor.weight.grad for name, factor in factors.items()}}


def _filled(split: Any, own: dict[str, Tensor], number: str, place: Parallel) -> Adapter:
    adapter = _adapter(split, own[f"w{number}"], place, site=int(number))
    adapter.linear_in.weight.data.copy_(own[f"a{number}"])
    adapter.linear_out.weight.data.copy_(own[f"b{number}"])
    return adapter


def _adapter(split: Any, weight: Tensor, place: Parallel, site: int, rank: int = RANK) -> Adapter:
    return Adapter(split, weight, rank=rank, alpha=ALPHA, dropout=DROPOUT, site=site, group=place.groups.tp)


def odd_rank() -> str:
    with parallel_layout(ParallelConfig(tensor_parallel_size=2), seed=1) as place:
        try:
            _adapter("column", torch.randn(12, 8), place, 0, rank=3)
        except ValueError as error:
            return str(error)
    return ""

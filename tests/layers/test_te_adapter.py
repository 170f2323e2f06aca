"""Adapters on linears that behave as TransformerEngine's give the same results as on our own linears.

TransformerEngine needs a CUDA device; these linears have its interface (parallel_mode, a norm inside, tuples out) and
plain arithmetic.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from worlds import Worlds

from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.microbatch_seed import set_microbatch_seed
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.layers.adapter import Adapter
from megatron_step.layers.te_adapter import make_adaptable

RANK = 4


class _NormLinear(torch.nn.Module):
    """Column-parallel, after a norm that it can return, as TELayerNormColumnParallelLinear."""

    parallel_mode = "column"

    def __init__(self, weight: Tensor, place: Parallel) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(weight.shape[1]))
        self.return_layernorm_output = False
        self.place = place

    def forward(self, x: Tensor) -> tuple[Any, None]:
        normed = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight)
        group = self.place.groups.tp
        if self.place.config.sequence_parallel:
            whole = mappings.gather_from_sequence_parallel_region(normed, group=group)
        else:
            whole = mappings.copy_to_tensor_model_parallel_region(normed, group=group)
        y = F.linear(whole, self.weight)
        return ((y, normed) if self.return_layernorm_output else y), None

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
        return {f"{prefix}weight": SimpleNamespace(key=f"{prefix}weight")}


class _RowLinear(torch.nn.Module):
    """Row-parallel, with its output reduced, as TERowParallelLinear."""

    parallel_mode = "row"

    def __init__(self, weight: Tensor, place: Parallel) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.place = place

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        partial, group = F.linear(x, self.weight), self.place.groups.tp
        if self.place.config.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(partial, group=group), None
        return mappings.reduce_from_tensor_model_parallel_region(partial, group=group), None


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_split_over_ranks_they_are_the_whole_ones(worlds: Worlds, sequence_parallel: bool) -> None:
    (expected,) = worlds(1).run(norm_then_row, parallel={})
    layout = {"tensor_parallel_size": 2, "sequence_parallel": sequence_parallel}
    ranks = worlds(2).run(norm_then_row, parallel=layout)
    for name, axis in {"a1": 0, "b1": 0, "a2": 1, "b2": 1}.items():
        assert_same(torch.cat([rank[name] for rank in ranks], axis), expected[name])
    for name in ("x", "y"):
        if sequence_parallel:
            assert_same(torch.cat([rank[name] for rank in ranks]), expected[name])
        else:
            assert_same(ranks[1][name], expected[name])


def test_one_process_is_the_formula(worlds: Worlds) -> None:
    (found,) = worlds(1).run(norm_then_row, parallel={})
    x, w1, a1, b1, w2, a2, b2, grad = (tensor.requires_grad_() for tensor in _whole())
    normed = F.rms_norm(x, (8,))
    hidden = F.linear(normed, w1) + 2 * F.linear(F.linear(normed, a1), b1)
    y = F.linear(hidden, w2) + 2 * F.linear(F.linear(hidden, a2), b2)
    y.backward(grad.detach())
    for name, tensor in {
        "y": y.detach(),
        "x": x.grad,
        "a1": a1.grad,
        "b1": b1.grad,
        "a2": a2.grad,
        "b2": b2.grad,
    }.items():
        assert_same(found[name], tensor)


def test_without_an_adapter_it_is_what_it_was(alone: Parallel) -> None:
    plain = _NormLinear(torch.randn(12, 8), alone)
    names = [name for name, _ in plain.named_parameters()]
    adaptable, x = make_adaptable(_NormLinear(plain.weight.data, alone), sequence_parallel=False), torch.randn(6, 2, 8)
    assert torch.equal(adaptable(x)[0], plain(x)[0])
    assert [name for name, _ in adaptable.named_parameters()] == names
    assert list(adaptable.sharded_state_dict("l.", (), {})) == ["l.weight"]
    adaptable.adapter = _adapter("column", plain.weight, alone)
    shards = adaptable.sharded_state_dict("l.", (), {"dp_cp_group": alone.groups.dp_cp})
    assert list(shards) == ["l.weight", "l.adapter.linear_in.weight", "l.adapter.linear_out.weight"]


def test_what_is_no_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm cannot hold an adapter"):
        make_adaptable(torch.nn.LayerNorm(4), sequence_parallel=False)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def _whole() -> tuple[Tensor, ...]:
    """x [s, b, h]; W, A and B of the first linear; of the second; the output's gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((6, 2, 8), (12, 8), (RANK, 8), (12, RANK), (8, 12), (RANK, 12), (8, RANK), (6, 2, 8))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _adapter(split: Any, weight: Tensor, place: Parallel) -> Adapter:
    return Adapter(split, weight, rank=RANK, alpha=2.0 * RANK, dropout=0.0, site=0, group=place.groups.tp)


# What the ranks run.


def norm_then_row(parallel: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every A and B."""
    with parallel_layout(ParallelConfig(**parallel), seed=1) as place:
        set_microbatch_seed(5)
        size, rank, sequence = place.groups.tp.size(), place.tp_rank, place.config.sequence_parallel
        x, w1, a1, b1, w2, a2, b2, grad = _whole()
        if sequence:
            x, grad = (tensor.chunk(size)[rank].clone() for tensor in (x, grad))
        w1, a1, b1 = (tensor.chunk(size)[rank].clone() for tensor in (w1, a1, b1))
        w2, a2, b2 = (tensor.chunk(size, 1)[rank].clone() for tensor in (w2, a2, b2))
        first = make_adaptable(_NormLinear(w1, place), sequence)
        second = make_adaptable(_RowLinear(w2, place), sequence)
        for linear, a, b in ((first, a1, b1), (second, a2, b2)):
            linear.adapter = _adapter(linear.split, linear.weight, place)
            linear.adapter.linear_in.weight.data.copy_(a)
            linear.adapter.linear_out.weight.data.copy_(b)
        y, _ = second(first(x.requires_grad_())[0])
        y.backward(grad)
        gradients = {
            f"{factor}{number}": getattr(linear.adapter, name).weight.grad
            for number, linear in (("1", first), ("2", second))
            for factor, name in (("a", "linear_in"), ("b", "linear_out"))
        }
        return {"y": y.detach(), "x": x.grad, **gradients}

"""Column- and row-parallel linears split over ranks give the outputs and gradients of the whole matrix."""

import pytest
import torch
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from worlds import Worlds

from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.layers.linear import _ParallelLinear


def _whole() -> tuple[torch.Tensor, ...]:
    """x [s, b, h], first weight [f, h], its bias [f], second weight [h, f], and the output's gradient [s, b, h]."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(size, generator=generator) for size in ((6, 2, 8), (12, 8), (12,), (8, 12), (6, 2, 8)))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_column_and_a_row_linear_are_two_whole_linears(worlds: Worlds, sequence_parallel: bool) -> None:
    x, first, bias, second, grad = (tensor.requires_grad_() for tensor in _whole())
    y = torch.nn.functional.linear(torch.nn.functional.linear(x, first, bias), second)
    y.backward(grad)
    ranks = worlds(2).run(_column_then_row, sequence_parallel=sequence_parallel)
    for rank, (output, dx, dfirst, dbias, dsecond) in enumerate(ranks):
        rows = slice(3 * rank, 3 * rank + 3) if sequence_parallel else slice(None)
        part = slice(6 * rank, 6 * rank + 6)
        torch.testing.assert_close(output, y[rows].detach())
        torch.testing.assert_close(dx, x.grad[rows])
        torch.testing.assert_close(dfirst, first.grad[part])
        torch.testing.assert_close(dbias, bias.grad[part])
        torch.testing.assert_close(dsecond, second.grad[:, part])


def _column_then_row(sequence_parallel: bool) -> tuple[torch.Tensor, ...]:
    config = ParallelConfig(tensor_parallel_size=2, sequence_parallel=sequence_parallel)
    with parallel_layout(config, seed=1) as parallel:
        x, first, bias, second, grad = _whole()
        rank, group = parallel.tp_rank, parallel.groups.tp
        part = slice(6 * rank, 6 * rank + 6)
        rows = slice(3 * rank, 3 * rank + 3) if sequence_parallel else slice(None)
        own = [tensor.clone().requires_grad_() for tensor in (x[rows], first[part], bias[part], second[:, part])]
        hidden = _ParallelLinear.apply(own[0], own[1], own[2], not sequence_parallel, sequence_parallel, group)
        partial = _ParallelLinear.apply(hidden, own[3], None, False, False, None)
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        output = reduce(partial, group=group)
        output.backward(grad[rows])
        return (output.detach(), *(tensor.grad for tensor in own))


def test_a_frozen_weight_gets_no_gradient_and_its_input_is_not_kept() -> None:
    x, weight = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4)
    y = _ParallelLinear.apply(x, weight, None, False, False, None)
    kept = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]
    assert [tuple(tensor.shape) for tensor in kept] == [(5, 4)]
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 2, 4))

import sys

import pytest
import torch

from megatron_step.engine.compat.operations import has_onednn_linear
from megatron_step.ops import dispatch, linear, linear_input_gradient, linear_weight_gradient
from megatron_step.ops.linear import linear_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "o", "i"), [((5,), 3, 2), ((3, 4), 40, 7), ((64,), 17, 50), ((2, 8), 33, 33)])
def test_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, rows, o, i, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(*rows, i).to(dtype), torch.randn(o, i).to(dtype)]
    assert_as_exact_as_torch(linear, linear_reference, inputs)


@pytest.mark.parametrize("by_onednn", [False, True])
def test_strided_operands(path, by_onednn, monkeypatch):
    if by_onednn:
        monkeypatch.setattr(dispatch, "_prefer_onednn", has_onednn_linear)  # on any CPU
    torch.manual_seed(0)
    x, weight, dy = torch.randn(6, 4, 10).transpose(0, 1), torch.randn(10, 12).t(), torch.randn(4, 6, 12)
    torch.testing.assert_close(linear(x, weight), x @ weight.t())
    torch.testing.assert_close(linear_input_gradient(dy, weight), dy @ weight)
    torch.testing.assert_close(linear_weight_gradient(dy, x), torch.einsum("sbo,sbi->oi", dy, x))


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("elements", [2**20, 200, 1])
def test_bf16_weights_compute_in_fp32(path, assert_bf16_weights_compute_in_fp32, elements, by_onednn, monkeypatch):
    if by_onednn:
        monkeypatch.setattr(dispatch, "_prefer_onednn", has_onednn_linear)  # on any CPU
    monkeypatch.setattr(
        sys.modules["megatron_step.ops.linear"], "WIDENED_ELEMENTS", elements
    )  # one block, some, one for each row
    torch.manual_seed(0)
    assert_bf16_weights_compute_in_fp32(linear, torch.randn(3, 5, 40), [torch.randn(33, 40)])


def test_no_rows(path):
    x, weight = torch.empty(0, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad.shape == (0, 4)
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_input_is_kept_only_for_the_weight_gradient(path, frozen):
    saved = []
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=not frozen)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = linear(x, weight)
    assert saved == ([weight.shape] if frozen else [x.shape, weight.shape])
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, 4))
    assert (weight.grad is None) == frozen


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(3, 4), torch.ones(5, 3)),
        (torch.ones(3, 4), torch.ones(4)),
        (torch.ones(3, 4).bfloat16(), torch.ones(5, 4)),
        (torch.ones(3, 4), torch.ones(5, 4).half()),
    ],
)
def test_wrong_shape_or_type_is_an_error(path, x, weight):
    with pytest.raises(ValueError, match="must agree"):
        linear(x, weight)

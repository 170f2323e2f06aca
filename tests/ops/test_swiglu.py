import pytest
import torch

from megatron_step.ops import swiglu
from megatron_step.ops.swiglu import swiglu_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2,), (3, 10), (5, 2, 66), (64, 2752)])
def test_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, shape, dtype):
    torch.manual_seed(0)
    assert_as_exact_as_torch(swiglu, swiglu_reference, [(3 * torch.randn(shape)).to(dtype)])


def test_whole_range_of_the_gate(path):
    gate = torch.tensor([-200.0, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 90.0, 200.0])
    x = torch.cat((gate, torch.ones(9))).requires_grad_()
    y = swiglu(x)
    y.sum().backward()
    exact = gate.double().requires_grad_()
    torch.nn.functional.silu(exact).sum().backward()
    # silu(-90) is below the smallest normal float32, where the exponential may give 0
    torch.testing.assert_close(y.double(), torch.nn.functional.silu(exact), rtol=1e-6, atol=1e-35)
    torch.testing.assert_close(x.grad[:9].double(), exact.grad, rtol=1e-6, atol=1e-35)


def test_strided_rows(path):
    x = torch.randn(4, 6, 20).transpose(0, 1)
    torch.testing.assert_close(swiglu(x), swiglu_reference(x))


def test_nan_is_not_hidden(path):
    x = torch.ones(2, 8)
    x[0, 0] = float("nan")
    assert swiglu(x).isnan().tolist() == [[True, False, False, False], [False] * 4]


def test_no_rows(path):
    assert swiglu(torch.empty(0, 8)).shape == (0, 4)


def test_threads(kernel, assert_same_on_any_number_of_threads):
    assert_same_on_any_number_of_threads(swiglu, [torch.randn(101, 34)])


@pytest.mark.parametrize("shape", [(), (3, 7), (3, 0)])
def test_odd_width_is_an_error(path, shape):
    with pytest.raises(ValueError, match="must be"):
        swiglu(torch.ones(shape))

import pytest
import torch
from torch import Tensor

from megatron_step.ops import rms_norm
from megatron_step.ops.rms_norm import rms_norm_reference


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, 1e-5)


def strided(*shape: int) -> Tensor:
    """Every second of twice as many rows."""
    return torch.randn(2 * shape[0], *shape[1:])[::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (7, 2, 33), (130, 512), (2, 1376)])
def test_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, shape, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)]
    assert_as_exact_as_torch(ours, reference, inputs)


def test_float32_weight_of_bfloat16_rows(path, assert_as_exact_as_torch):
    torch.manual_seed(0)
    assert_as_exact_as_torch(ours, reference, [torch.randn(9, 40).bfloat16(), torch.randn(40)])


def test_bf16_weights_compute_in_fp32(path, assert_bf16_weights_compute_in_fp32):
    torch.manual_seed(0)
    assert_bf16_weights_compute_in_fp32(ours, torch.randn(9, 40), [torch.randn(40)])


def test_strided_rows(path):
    torch.manual_seed(0)
    x, weight = strided(6, 3, 16).transpose(0, 1), torch.randn(16)
    torch.testing.assert_close(ours(x, weight), reference(x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_run_as_torch(dtype):
    x, weight = torch.randn(4, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    torch.testing.assert_close(ours(x, weight), reference(x, weight))


def test_only_the_gradients_asked_for(path):
    x, weight = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    ours(x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).sum(0))


def test_nan_and_infinity_are_not_hidden(path):
    x = torch.ones(3, 8)
    x[0, 1], x[1, 1] = float("nan"), float("inf")
    y = ours(x, torch.ones(8))
    assert y[0].isnan().all()
    assert y[1, 1].isnan()
    assert y[2].isfinite().all()


def test_no_rows(path):
    assert ours(torch.empty(0, 8), torch.ones(8)).shape == (0, 8)


def test_threads(kernel, assert_same_on_any_number_of_threads):
    torch.manual_seed(0)
    assert_same_on_any_number_of_threads(ours, [torch.randn(300, 48), torch.randn(48)])


@pytest.mark.parametrize("weight", [torch.ones(7), torch.ones(2, 4)])
def test_wrong_weight_is_an_error(path, weight):
    with pytest.raises(ValueError, match="weight must be"):
        ours(torch.ones(3, 8), weight)

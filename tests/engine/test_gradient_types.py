import pytest
import torch

from megatron_step.engine import gradient_types
from megatron_step.engine.gradient_types import check_gradient_types, keep_gradient_type


def test_a_bf16_weight_gets_an_fp32_gradient() -> None:
    weight = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    keep_gradient_type(weight, torch.float32)
    factor = 1 + 2.0**-12  # bf16 rounds it to 1
    (weight * torch.full((3,), factor) + weight * torch.full((3,), factor)).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2 * factor))


def test_a_torch_that_rounds_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gradient_types()
    monkeypatch.setattr(gradient_types, "Tensor", object)
    with pytest.raises(ValueError, match="install torch 2.10 or later, or set training.precision to bf16 or fp32"):
        check_gradient_types()

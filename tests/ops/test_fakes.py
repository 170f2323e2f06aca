import pytest
import torch

from megatron_step.ops import fakes, rms_norm, swiglu

OPERATIONS = torch.ops.megatron_step


def arguments(dtype: torch.dtype) -> dict[str, tuple]:
    """Small valid arguments of every kernel."""
    q, k, v = (torch.randn(5, 2, heads, 8).to(dtype) for heads in (4, 2, 2))
    out, logsumexp = OPERATIONS.attention_forward(q, k, v, 0.5)
    cos, sin = torch.randn(5, 8), torch.randn(5, 8)
    x, weight, rstd = torch.randn(6, 8).to(dtype), torch.randn(8).to(dtype), torch.ones(6)
    logits, labels = torch.randn(6, 10).to(dtype), torch.arange(6)
    weight16, remainder, moment = torch.randn(6, 70).bfloat16(), torch.zeros(6, 70).short(), torch.rand(6, 70)
    gradient, scale = torch.randn(6, 70).to(dtype), torch.ones(6, 2).bfloat16()
    codes = (remainder.char(), remainder.byte(), scale, scale.clone())
    adamw = (None, 0.5, 0.99, 0.9, 0.95, 1.0, 1e-8, 0.1, 3, 0, 70, 0)
    return {
        "adapter_dropout": (x, 0.1, 3, 8, 16),
        "attention_forward": (q, k, v, 0.5),
        "attention_backward": (out, q, k, v, out, logsumexp, 0.5),
        "compact_adamw_": (weight16, gradient, remainder, *codes, *adamw),
        "compact_adamw_peaks": (gradient, *codes, 0.5, 0.9, 0.95, 0),
        "cross_entropy_forward": (logits, labels, 9),
        "cross_entropy_backward_": (logits, labels, torch.ones(6).double(), torch.ones(6).double(), torch.ones(6), 9),
        "join_main": (weight16, remainder, moment),
        "narrow_products": (torch.randn(6, 8), torch.randn(6, 3), torch.randn(8, 3), 0.5),
        "rank_update_": (torch.randn(6, 8), torch.randn(6, 3), torch.randn(3, 8), 0.5),
        "rms_norm_forward": (x, weight, 1e-5),
        "rms_norm_backward": (x, x, weight, rstd, True, True),
        "rotary": (q, cos, sin, False),
        "split_qkv_rotary_forward": (torch.randn(5, 2, 64).to(dtype), cos, sin, 4, 2),
        "split_qkv_rotary_backward": (q, k, v, cos, sin),
        "split_main_": (torch.randn(6, 70), weight16, remainder, moment),
        "swiglu_forward": (x,),
        "swiglu_backward": (x[:, :4].contiguous(), x),
        "transpose": (torch.randn(6, 8),),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [fake.__name__ for fake in fakes.FAKES])
def test_fake_kernel_agrees_with_the_real_one(kernel, name, dtype):
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(OPERATIONS, name).default, arguments(dtype)[name], test_utils=tests)


def test_every_kernel_has_a_fake(kernel):
    assert set(arguments(torch.float32)) == {fake.__name__ for fake in fakes.FAKES}


def test_operations_are_traced_as_one_graph(kernel):
    def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return swiglu(rms_norm(x, weight, 1e-5))

    x, weight = torch.randn(6, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(compiled, block(x, weight))
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), (x, weight)), torch.autograd.grad(block(x, weight).sum(), (x, weight))
    )

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.ops import attention
from megatron_step.ops.attention import attention_reference


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own fused attention on [s, b, n, d]."""
    s, b, n, d = q.shape
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).reshape(s, b, n * d)


# (s, b, n, g, d): one token; ragged blocks; head sizes beside the vector length; several blocks of keys; long
SHAPES = [
    (1, 1, 1, 1, 1),
    (31, 2, 2, 2, 24),
    (33, 1, 4, 2, 80),
    (130, 2, 6, 1, 17),
    (300, 1, 2, 2, 64),
    (257, 1, 1, 1, 128),
]


def inputs(s: int, b: int, n: int, g: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, b, heads, d).to(dtype) for heads in (n, g, g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, shape, dtype):
    assert_as_exact_as_torch(attention, torch_attention, inputs(*shape, dtype))


def test_reference_is_torch_attention():
    tensors = [x.double() for x in inputs(9, 2, 4, 2, 6, torch.float32)]
    torch.testing.assert_close(attention_reference(*tensors), torch_attention(*tensors))


def test_scale(path):
    q, k, v = inputs(20, 1, 2, 2, 16, torch.float32)
    torch.testing.assert_close(attention(q, k, v, 0.7), attention_reference(q, k, v, 0.7))


def test_large_scores_do_not_overflow(path):
    q, k, v = inputs(150, 1, 1, 1, 16, torch.float32)
    out = attention(100 * q, 100 * k, v)
    torch.testing.assert_close(out, attention_reference(100 * q, 100 * k, v), rtol=1e-3, atol=1e-3)


def test_later_tokens_do_not_matter(path):
    q, k, v = inputs(140, 1, 2, 1, 16, torch.float32)
    before = attention(q, k, v)
    k[70:], v[70:] = 1e4, -1e4
    after = attention(q, k, v)
    assert torch.equal(before[:70], after[:70])
    assert (before[70:] != after[70:]).all()


def test_strided_views_of_a_fused_projection(path):
    torch.manual_seed(0)
    fused = torch.randn(40, 2, 2, 4, 16, requires_grad=True)  # s, b, groups, 2 queries + key + value, d
    parts = fused[:, :, :, :2].flatten(2, 3), fused[:, :, :, 2], fused[:, :, :, 3]
    ours = attention(*parts)
    expected = attention_reference(*parts)
    torch.testing.assert_close(ours, expected)
    for x, y in zip(
        torch.autograd.grad(ours.square().sum(), fused), torch.autograd.grad(expected.square().sum(), fused)
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_last_dimension_of_any_stride(path):
    q, k, v = (x.mT.contiguous().mT for x in inputs(40, 2, 4, 4, 16, torch.float32))
    torch.testing.assert_close(attention(q, k, v), attention_reference(q, k, v))


def test_no_tokens(path):
    q, k, v = inputs(0, 1, 2, 2, 8, torch.float32)
    assert attention(q, k, v).shape == (0, 1, 16)


def test_threads(kernel, assert_same_on_any_number_of_threads):
    assert_same_on_any_number_of_threads(attention, inputs(70, 2, 4, 2, 16, torch.float32))


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((4, 2, 8), (4, 2, 8), "must be"),
        ((4, 1, 3, 8), (4, 1, 2, 8), "multiple"),
        ((4, 1, 2, 8), (5, 1, 2, 8), "share"),
        ((4, 1, 2, 8), (4, 1, 2, 16), "share"),
    ],
)
def test_wrong_shapes_are_errors(path, q, k, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.ones(q), torch.ones(k), torch.ones(k))


def test_mixed_types_are_an_error(path):
    q, k, v = inputs(4, 1, 2, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="one type"):
        attention(q, k.bfloat16(), v)

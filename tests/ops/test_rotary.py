import functools

import pytest
import torch
from torch import Tensor

from megatron_step.ops import rotary, split_qkv_rotary
from megatron_step.ops.rotary import rotary_reference, split_qkv_rotary_reference


def angles(s: int, d: int) -> tuple[Tensor, Tensor]:
    """cos and sin [s, d] of different angles in the two halves, more general than the embedding needs."""
    theta = torch.arange(s)[:, None] * torch.linspace(1.0, 0.01, d)
    return theta.cos(), theta.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (5, 2, 3, 6), (33, 2, 4, 64), (4, 1, 2, 34)])
def test_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, shape, dtype):
    torch.manual_seed(0)
    cos, sin = angles(shape[0], shape[3])
    operation = functools.partial(rotary, cos=cos, sin=sin)
    reference = functools.partial(rotary_reference, cos=cos, sin=sin)
    assert_as_exact_as_torch(operation, reference, [torch.randn(shape).to(dtype)])


def test_strided_heads_of_a_fused_projection(path):
    fused = torch.randn(6, 2, 4, 3, 8)
    cos, sin = angles(6, 8)
    for x in (fused[:, :, :, 1], fused[:, :, :, 0].transpose(1, 2).contiguous().transpose(1, 2), fused[..., 2].mT):
        cos_x, sin_x = angles(6, x.shape[3])
        torch.testing.assert_close(rotary(x, cos_x, sin_x), rotary_reference(x, cos_x, sin_x))
    assert rotary(fused[:, :, :, 1], cos, sin).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "g", "d"), [(1, 1, 2), (4, 4, 8), (6, 2, 10), (8, 1, 64)])
def test_split_error_is_at_most_twice_that_of_torch(path, assert_as_exact_as_torch, n, g, d, dtype):
    torch.manual_seed(0)
    cos, sin = angles(7, d)
    sizes = {"cos": cos, "sin": sin, "num_attention_heads": n, "num_query_groups": g}
    operation = functools.partial(split_qkv_rotary, **sizes)
    reference = functools.partial(split_qkv_rotary_reference, **sizes)
    assert_as_exact_as_torch(operation, reference, [torch.randn(7, 2, (n + 2 * g) * d).to(dtype)])


def test_split_follows_the_layout_of_query_groups(path):
    """Without rotation the parts are the named columns: each group is its queries, then key, then value."""
    qkv = torch.arange(16.0).expand(1, 1, 16)  # n = 4, g = 2, d = 2
    q, k, v = split_qkv_rotary(qkv, torch.ones(1, 2), torch.zeros(1, 2), num_attention_heads=4, num_query_groups=2)
    assert q.flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.flatten().tolist() == [4, 5, 12, 13]
    assert v.flatten().tolist() == [6, 7, 14, 15]


def test_unused_outputs_have_zero_gradient(path):
    qkv = torch.randn(3, 1, 12, requires_grad=True)
    cos, sin = angles(3, 4)
    _, _, v = split_qkv_rotary(qkv, cos, sin, num_attention_heads=1, num_query_groups=1)
    v.sum().backward()
    assert qkv.grad.view(3, 3, 4)[:, :2].eq(0).all()
    assert qkv.grad.view(3, 3, 4)[:, 2].eq(1).all()


def test_threads(kernel, assert_same_on_any_number_of_threads):
    cos, sin = angles(41, 8)
    operation = functools.partial(split_qkv_rotary, cos=cos, sin=sin, num_attention_heads=2, num_query_groups=1)
    assert_same_on_any_number_of_threads(operation, [torch.randn(41, 2, 32)])


@pytest.mark.parametrize(
    ("x", "cos"),
    [
        (torch.ones(3, 2, 8), torch.ones(3, 8)),
        (torch.ones(3, 1, 2, 7), torch.ones(3, 7)),
        (torch.ones(3, 1, 2, 8), torch.ones(4, 8)),
        (torch.ones(3, 1, 2, 8), torch.ones(3, 8, dtype=torch.bfloat16)),
        (torch.ones(3, 1, 2, 8), torch.ones(8, 3).t()),
    ],
)
def test_wrong_shape_or_type_is_an_error(path, x, cos):
    with pytest.raises(ValueError, match="must be"):
        rotary(x, cos, cos)


@pytest.mark.parametrize(("width", "n", "g"), [(13, 1, 1), (12, 3, 2), (12, 2, 0)])
def test_projection_that_does_not_split_is_an_error(path, width, n, g):
    with pytest.raises(ValueError, match="qkv must be"):
        split_qkv_rotary(
            torch.ones(3, 1, width), torch.ones(3, 4), torch.ones(3, 4), num_attention_heads=n, num_query_groups=g
        )

"""Every operation at the sizes of real models: long in one dimension at a time, so that the suite stays fast.

A sum whose error grows with its length passes at the sizes of the other tests and fails here.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_step.ops import (
    AdapterDropout,
    adapter_linear,
    attention,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary,
    split_qkv_rotary,
    swiglu,
)
from megatron_step.ops.adapter_dropout import drop, dropout_mask_reference
from megatron_step.ops.adapter_linear import adapter_linear_reference
from megatron_step.ops.linear import linear_reference
from megatron_step.ops.linear_cross_entropy import _statistics, linear_cross_entropy_reference
from megatron_step.ops.rms_norm import rms_norm_reference
from megatron_step.ops.rotary import rotary_reference, split_qkv_rotary_reference
from megatron_step.ops.swiglu import swiglu_reference

VOCABULARY, WIDTH, FFN, TOKENS, HEADS = 151_936, 8192, 28_672, 32_768, 128


def trained(tokens: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, output layer and labels of a trained model: a label's logit is 18, the other logits are -8 to 8."""
    torch.manual_seed(1)
    hidden, labels = torch.randn(tokens, h), torch.randperm(v)[: min(tokens, v)].repeat(-(-tokens // v))[:tokens]
    weight = 2.0 * torch.randn(v, h) / h**0.5
    weight[labels] = 18.0 * hidden / hidden.square().sum(-1, keepdim=True)
    return hidden, weight, labels


# tokens, h, v: a long sum over the vocabulary, one over the width, one over tokens
@pytest.mark.parametrize(("tokens", "h", "v"), [(24, 16, VOCABULARY), (16, WIDTH, 96), (TOKENS, 8, 40)])
def test_linear_cross_entropy(assert_exact_and_unbiased, tokens, h, v):
    hidden, weight, labels = trained(tokens, h, v)
    operation = functools.partial(linear_cross_entropy, labels=labels)
    assert_exact_and_unbiased(
        operation, functools.partial(linear_cross_entropy_reference, labels=labels), [hidden, weight]
    )


def test_loss_over_a_large_vocabulary_is_the_same_in_every_layout(path):
    """Sums of each rank, put together as the ranks do."""
    hidden, weight, labels = trained(24, 16, VOCABULARY)
    logits = hidden @ weight.t()
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    of_torch = (F.cross_entropy(logits, labels, reduction="none") - exact).abs()
    for ranks in (1, 2, 3, 4, 8):
        width = -(-VOCABULARY // ranks)
        parts = [
            _statistics(logits[:, first : first + width].contiguous(), labels - first, min(width, VOCABULARY - first))
            for first in range(0, VOCABULARY, width)
        ]
        maximum = torch.stack([part[0] for part in parts]).amax(0)
        total = sum(part[1] * torch.exp(part[0] - maximum) for part in parts)
        error = total.log() + maximum - sum(part[2] for part in parts) - exact
        assert error.abs().max() <= min(2e-6, float(of_torch.max())), ranks
        assert error.mean().abs() <= 1e-6, ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, WIDTH), (TOKENS, 8)])
def test_rms_norm(assert_exact_and_unbiased, shape, dtype):
    torch.manual_seed(0)
    operation, reference = (functools.partial(f, epsilon=1e-5) for f in (rms_norm, rms_norm_reference))
    x, weight = 0.5 + torch.randn(shape), torch.randn(shape[-1])  # real activations have a mean
    assert_exact_and_unbiased(operation, reference, [x.to(dtype), weight.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2 * FFN), (TOKENS, 8)])
def test_swiglu(assert_exact_and_unbiased, shape, dtype):
    torch.manual_seed(0)
    assert_exact_and_unbiased(swiglu, swiglu_reference, [(3 * torch.randn(shape)).to(dtype)])


def angles(s: int, d: int) -> tuple[Tensor, Tensor]:
    theta = (torch.arange(s)[:, None] * 10_000 ** -(torch.arange(d // 2) / (d // 2)).double()).repeat(1, 2)
    return theta.cos().float(), theta.sin().float()


@pytest.mark.parametrize(("s", "n", "d"), [(TOKENS, 1, 8), (2, HEADS, 128)])
def test_rotary(assert_exact_and_unbiased, s, n, d):
    torch.manual_seed(0)
    cos, sin = angles(s, d)
    operation, reference = (functools.partial(f, cos=cos, sin=sin) for f in (rotary, rotary_reference))
    assert_exact_and_unbiased(operation, reference, [torch.randn(s, 1, n, d)])
    sizes = {"cos": cos, "sin": sin, "num_attention_heads": n, "num_query_groups": 1}
    operation, reference = (functools.partial(f, **sizes) for f in (split_qkv_rotary, split_qkv_rotary_reference))
    assert_exact_and_unbiased(operation, reference, [torch.randn(s, 1, (n + 2) * d)])


# (s, n, g, d): one long sequence, as many heads as read one group, wide heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("s", "n", "g", "d"), [(4096, 1, 1, 8), (130, HEADS, 1, 8), (300, 1, 1, 256)])
def test_attention(assert_exact_and_unbiased, s, n, g, d, sink, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(s, 1, heads, d) for heads in (n, g, g))
    if sink:  # as in trained models: the first token's score is 16, so it gets most of the weight
        q[..., 0], k[..., 0], k[0, ..., 0] = 4 * d**0.5, 0.0, 4.0
    v += 0.5
    assert_exact_and_unbiased(attention, torch_attention, [x.to(dtype) for x in (q, k, v)])


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own fused attention, which needs no [s, s] matrix in float64 either."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return out.permute(2, 0, 1, 3).flatten(2)


def test_attention_over_32k_tokens(kernel):
    """64 keys, repeated in random order: their exact softmax takes 64 terms of each query, not 32,768.

    In fp32, sums of 64 terms err less than those of torch's own attention over all keys: the bound is a strict one.
    """
    torch.manual_seed(0)
    which = torch.randint(64, (TOKENS,))
    q, dout = torch.randn(TOKENS, 8), torch.randn(TOKENS, 8)
    k, v = torch.randn(64, 8), 0.5 + torch.randn(64, 8)
    leaves = [x.view(TOKENS, 1, 1, 8).requires_grad_() for x in (q.clone(), k[which], v[which])]
    out = attention(*leaves)
    out.backward(dout.view(TOKENS, 1, 8))
    some = torch.arange(0, TOKENS, 257)
    dq, dk, dv = (x.grad.view(TOKENS, 8) for x in leaves)
    exact = attention_of_repeated_keys(*(x.double() for x in (q, k, v, dout)), which, some)
    plain = attention_of_repeated_keys(q, k, v, dout, which, some)
    for x, y, z in zip((out.detach().view(TOKENS, 8), dq, dk[some], dv[some]), plain, exact):
        error, of_torch = x.double() - z, y.double() - z
        assert error.norm() <= 2 * of_torch.norm()
        assert error.abs().max() <= 2 * of_torch.abs().max()
        if len(z) == TOKENS:  # a few of the first keys make up nearly all of dk and dv, so that any error is a bias
            assert abs((error * z).sum()) <= torch.finfo(torch.float32).eps * z.square().sum()


def attention_of_repeated_keys(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, which: Tensor, some: Tensor
) -> tuple[Tensor, ...]:
    """out and dq of queries [s, d], dk and dv of `some` keys; token j has key and value `which[j]` of k, v [m, d]."""
    counts = F.one_hot(which, len(k)).cumsum(0).to(q.dtype)  # [s, m]: how often a query sees a key
    scores, dp = q @ k.t() / k.shape[1] ** 0.5, dout @ v.t()
    p = torch.exp(scores - (scores + counts.log()).logsumexp(1, keepdim=True))  # of one occurrence
    out = (p * counts) @ v
    ds = p * (dp - (dout * out).sum(1, keepdim=True)) / k.shape[1] ** 0.5
    dk = torch.stack([ds[j:, which[j]] @ q[j:] for j in some.tolist()])
    dv = torch.stack([p[j:, which[j]] @ dout[j:] for j in some.tolist()])
    return out, (ds * counts) @ k, dk, dv


# rows, o, i: a long sum over tokens (for dW), over a vocabulary (for dx), over inputs
@pytest.mark.parametrize(
    ("rows", "o", "i", "dtype"),
    [
        (TOKENS, 64, 64, torch.float32),
        (8, VOCABULARY, 16, torch.float32),
        (64, 64, WIDTH, torch.float32),
        (64, 64, WIDTH, torch.bfloat16),
    ],
)
def test_linear(assert_exact_and_unbiased, rows, o, i, dtype):
    torch.manual_seed(0)
    inputs = [(0.5 + torch.randn(rows, i)).to(dtype), torch.randn(o, i).to(dtype)]
    assert_exact_and_unbiased(linear, linear_reference, inputs)


@pytest.mark.parametrize(("r", "dropped"), [(16, False), (16, True), (128, False)])
@pytest.mark.parametrize(("rows", "n", "k"), [(64, WIDTH, 64), (64, 64, WIDTH), (TOKENS, 64, 8), (TOKENS, 8, 64)])
def test_adapter_linear(assert_exact_and_unbiased, rows, n, k, r, dropped):
    torch.manual_seed(0)
    x, weight = 0.5 + torch.randn(rows, k), torch.randn(n, k) / k**0.5
    a, b = torch.randn(r, k) / k**0.5, torch.randn(n, r)
    dropout = AdapterDropout(0.3, 11, 0, k) if dropped else None

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapter_linear(x, weight, a, b, 0.7, dropout)

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapter_linear_reference(x, weight.to(x.dtype), a, b, 0.7, dropout)

    assert_exact_and_unbiased(ours, reference, [x, a, b])


@pytest.mark.parametrize("shape", [(TOKENS, 24), (7, FFN)])
def test_dropout_keeps_the_mean(path, shape):
    dropout = AdapterDropout(0.1, 5, 0, shape[1])
    x = 0.5 + torch.randn(shape)
    dropped = drop(x, dropout)
    assert torch.equal(dropped, x * dropout_mask_reference(shape, dropout))
    assert abs(dropped.double().mean() / x.double().mean() - 1) < 0.01


@pytest.mark.parametrize("shape", [(VOCABULARY, 8), (8, TOKENS)])
def test_transpose(kernel, shape):
    matrix = torch.randn(shape)
    assert torch.equal(torch.ops.megatron_step.transpose(matrix), matrix.t())

"""Self-attention on SDPA is causal, groups its heads, and rotates queries and keys."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from small_run import PLAIN, TIED, VOCAB_SIZE, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.layers.attention import SDPAttention, SelfAttention
from megatron_step.model.build import build_model


def _attention(model: dict, parallel: Parallel, recompute: str = "none") -> tuple:
    config = small_config(model=model, parallel={"recompute": recompute})
    (chunk,) = build_model(config.model, VOCAB_SIZE, replace(parallel, config=config.parallel), "fp32", seed=1)
    attention = chunk.decoder.layers[0].self_attention
    assert isinstance(attention, SelfAttention)
    return attention, chunk.rotary_pos_emb(config.model.seq_length)


@pytest.mark.parametrize("model", [PLAIN, TIED], ids=["plain", "normed heads and biases"])
def test_output_is_that_of_the_formula(alone: Parallel, model: dict) -> None:
    attention, rotary = _attention(model, alone)
    torch.manual_seed(0)
    x = torch.randn(32, 2, 64)  # [s, b, h]
    qkv = torch.nn.functional.linear(x, attention.linear_qkv.weight, attention.linear_qkv.bias).view(32, 2, 2, 4, 16)
    query, key, value = qkv[..., :2, :].reshape(32, 2, 4, 16), qkv[..., 2, :], qkv[..., 3, :]
    if attention.q_layernorm is not None:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    query, key = (_rotate(part, rotary) for part in (query, key))
    key, value = (part.repeat_interleave(2, dim=2) for part in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / 4.0
    scores = scores.masked_fill(torch.ones(32, 32).triu(1).bool(), float("-inf"))
    context = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value).reshape(32, 2, 64)
    expected = torch.nn.functional.linear(context, attention.linear_proj.weight)
    torch.testing.assert_close(attention(x, None, rotary)[0], expected, rtol=1e-4, atol=1e-6)


def _rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """x [s, b, n, d]: pairs of channels i and i + d / 2 turn by the position's angle."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = rotary[:, :, None, None]
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def test_selective_recompute_gives_the_same_gradient(alone: Parallel) -> None:
    gradients = []
    for recompute in ("none", "selective"):
        attention, rotary = _attention(PLAIN, alone, recompute)
        assert attention.checkpoint_core_attention == (recompute == "selective")
        torch.manual_seed(0)
        x = torch.randn(32, 2, 64, requires_grad=True)
        attention(x, None, rotary)[0].square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_other_masks_are_refused(alone: Parallel) -> None:
    with pytest.raises(ValueError, match="SDPAttention supports the causal mask only"):
        SDPAttention(None, 1, AttnMaskType.padding, "self")  # type: ignore[arg-type]

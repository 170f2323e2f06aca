"""Angles are those of transformers, plain and with Llama-3's scaling."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_step.config.model import ModelConfig, RopeScalingConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.layers.rotary import RotaryEmbedding

_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("scaled", [False, True])
def test_cosines_and_sines_are_those_of_transformers(alone: Parallel, scaled: bool) -> None:
    model = ModelConfig(
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=2,
        seq_length=128,
        rope_theta=5e4,
        rope_scaling=RopeScalingConfig(**_SCALING, original_max_position=64) if scaled else RopeScalingConfig(),
    )
    rope = {"rope_type": "default", "rope_theta": 5e4}
    if scaled:
        rope = {"rope_type": "llama3", "rope_theta": 5e4, **_SCALING, "original_max_position_embeddings": 64}
    peer = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope))
    cosine, sine = peer(torch.zeros(1), torch.arange(128)[None])
    ours = RotaryEmbedding(model, torch.device("cpu"), alone.groups.cp)(128)
    torch.testing.assert_close(ours, torch.stack((cosine[0], sine[0])), rtol=1e-4, atol=1e-5)


def test_they_are_computed_once_for_a_length(alone: Parallel) -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, seq_length=4)
    rotary = RotaryEmbedding(model, torch.device("cpu"), alone.groups.cp)
    first = rotary(4)
    assert rotary(4) is first
    assert rotary(6).shape == (2, 6, 8)

"""The count of operations agrees with torch's own counter."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_step.config.model import ModelConfig
from megatron_step.planner.flops import forward_flops_per_token, training_flops_per_token


def test_operations_are_those_that_torch_counts() -> None:
    seq_length, vocab_size = 16, 96
    model = ModelConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=seq_length,
    )
    peer = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3,
            hidden_size=32,
            intermediate_size=80,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab_size,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter:
        peer(torch.zeros(1, seq_length, dtype=torch.long))
    # torch counts all s^2 scores, the formula the s (s + 1) / 2 of the causal half.
    all_scores = 3 * 2 * 2 * 32 * seq_length * seq_length
    causal_scores = 3 * 2 * 2 * 32 * seq_length * (seq_length + 1) // 2
    expected = counter.get_total_flops() - all_scores + causal_scores
    assert forward_flops_per_token(model, vocab_size) * seq_length == expected


def test_the_backward_pass_takes_twice_the_forward() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, seq_length=4)
    assert training_flops_per_token(model, 10) == 3 * forward_flops_per_token(model, 10)

from dataclasses import replace

import pytest
import torch

from benchmarks.configs import run_config
from benchmarks.train_arms import (
    llama_weights,
    megatron_core_arm,
    megatron_step_arm,
    random_batch,
    transformers_arm,
    weights_of,
)
from megatron_step.config.model import ModelConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.training.state import initial_state

TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=16,
    vocab_size=128,
)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 3e-3)])
def test_arms_train_the_same_model(precision, tolerance):
    # Without weight decay: the stock arms decay the norms too.
    config = run_config(TINY, 2, precision)
    config = replace(config, optimizer=replace(config.optimizer, weight_decay=0.0, learning_rate=1e-2))
    batch = random_batch(TINY, 2)
    with parallel_layout(config.parallel, seed=1) as parallel:
        state = initial_state(config, TINY.vocab_size, parallel)
        weights = weights_of(state)
        arms = [
            megatron_step_arm(state, batch, config, parallel),
            megatron_core_arm(weights, batch, config),
            transformers_arm(weights, batch, config),
        ]
        losses = torch.tensor([[arm() for _ in range(4)] for arm in arms])
    assert losses[0, -1] < losses[0, 0] - 0.1  # it learns, so that equal losses mean equal updates
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=tolerance, atol=0)


def test_weights_are_copies():
    config = run_config(TINY, 2, "fp32")
    batch = random_batch(TINY, 2)
    with parallel_layout(config.parallel, seed=1) as parallel:
        state = initial_state(config, TINY.vocab_size, parallel)
        weights = weights_of(state)
        before = {name: weight.clone() for name, weight in weights.items()}
        megatron_step_arm(state, batch, config, parallel)()
        after = weights_of(state)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert not torch.equal(after["output_layer.weight"], before["output_layer.weight"])


def test_llama_weights_split_the_fused_rows():
    d, h = TINY.attention_head_size, TINY.hidden_size
    rows = torch.arange(8 * d).float().unsqueeze(1).expand(-1, h)  # two groups of two queries, a key and a value
    names = ["self_attention.linear_proj", "input_layernorm", "pre_mlp_layernorm", "mlp.linear_fc2"]
    weights = {f"decoder.layers.0.{name}.weight": torch.zeros(1) for name in names}
    weights |= {
        "decoder.layers.0.self_attention.linear_qkv.weight": rows,
        "decoder.layers.0.mlp.linear_fc1.weight": torch.arange(4.0),
    }
    weights |= {
        name: torch.zeros(1)
        for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")
    }
    llama = llama_weights(weights, replace(TINY, num_layers=1))
    attention = "model.layers.0.self_attn."
    heads = {name: (llama[f"{attention}{name}.weight"][::d, 0] / d).tolist() for name in ("q_proj", "k_proj", "v_proj")}
    assert heads == {"q_proj": [0, 1, 4, 5], "k_proj": [2, 6], "v_proj": [3, 7]}
    assert llama["model.layers.0.mlp.gate_proj.weight"].tolist() == [0, 1]
    assert llama["model.layers.0.mlp.up_proj.weight"].tolist() == [2, 3]


def test_labels_are_the_next_tokens():
    batch = random_batch(TINY, 3)
    assert batch["tokens"].shape == batch["labels"].shape == (3, TINY.seq_length)
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])

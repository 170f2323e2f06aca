"""transformers' Llama, Qwen2 and Qwen3 with the same weights give the same logits and the same training losses."""

from typing import Any

import pytest
import torch
from small_run import VOCAB_SIZE, made_up_batch, small_config, whole_tensors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from worlds import Worlds

from megatron_step.config.model import ModelConfig, RopeScalingConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.training.state import initial_state
from megatron_step.training.step import train_step

LLAMA3 = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)

# Our architecture, the peer's classes, and what else the peer must be told.
PEERS: dict[str, tuple[dict[str, Any], type, type, dict[str, Any]]] = {
    "Llama, as many groups as heads": ({}, LlamaForCausalLM, LlamaConfig, {}),
    "Llama, three query heads a group": (
        {"num_attention_heads": 6, "num_query_groups": 2, "hidden_size": 96},
        LlamaForCausalLM,
        LlamaConfig,
        {},
    ),
    "Llama 3, tied and scaled": (
        {"num_query_groups": 1, "tie_embeddings": True, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "Qwen2, with biases": ({"num_query_groups": 2, "qkv_bias": True}, Qwen2ForCausalLM, Qwen2Config, {}),
    "Qwen3, normed heads of another size": (
        {"num_query_groups": 2, "qk_norm": True, "head_size": 24, "tie_embeddings": True},
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 24},
    ),
}


@pytest.fixture(params=list(PEERS))
def pair(request: pytest.FixtureRequest, worlds: Worlds) -> tuple[RunConfig, dict[str, Any], PreTrainedModel]:
    """Our run, its first weights, logits and losses, and the peer with the same weights."""
    model, peer_class, config_class, more = PEERS[request.param]
    config = small_config(model=model, parallel={"distributed_optimizer": False})
    (ours,) = worlds(1).run(weights_logits_and_losses, config=config)
    torch.manual_seed(0)
    peer = peer_class(peer_config(config.model, config_class, more))
    missing = peer.load_state_dict(peer_weights(ours["weights"], config.model), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["lm_head.weight"] if config.model.tie_embeddings else [])
    return config, ours, peer


def test_logits_and_losses_of_twenty_steps(pair: tuple[RunConfig, dict[str, Any], PreTrainedModel]) -> None:
    config, ours, peer = pair
    with torch.no_grad():
        logits = peer(batch(config, 0)[0]).logits
    # Weights are far from their initial values, so that a wrong rotation or grouping shows in the logits.
    assert logits.std() > 0.2
    assert (ours["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()

    decayed = [weight for weight in peer.parameters() if weight.dim() > 1]
    others = [weight for weight in peer.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
    )
    losses, norms = [], []
    for step in range(20):
        tokens, labels = batch(config, step)
        loss = torch.nn.functional.cross_entropy(peer(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(peer.parameters(), config.optimizer.clip_grad)))
        optimizer.step()
        losses.append(loss.item())
    assert ours["losses"] == pytest.approx(losses, rel=1e-4)
    assert ours["grad_norms"] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > config.optimizer.clip_grad  # clipping took part


def peer_config(model: ModelConfig, config_class: type, more: dict[str, Any]) -> Any:
    return config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tie_embeddings,
        max_position_embeddings=model.seq_length,
        attn_implementation="eager",
        **{"rope_theta": model.rope_theta, **more},
    )


def peer_weights(weights: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names: Q, K and V apart, the padding of the vocabulary left out."""
    named = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCAB_SIZE],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    if not model.tie_embeddings:
        named["lm_head.weight"] = weights["output_layer.weight"][:VOCAB_SIZE]
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            qkv = split_qkv(weights[f"{ours}self_attention.linear_qkv.{kind}"], model)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), qkv):
                named[f"{theirs}self_attn.{name}.{kind}"] = part
        if model.qk_norm:
            named[f"{theirs}self_attn.q_norm.weight"] = weights[f"{ours}self_attention.q_layernorm.weight"]
            named[f"{theirs}self_attn.k_norm.weight"] = weights[f"{ours}self_attention.k_layernorm.weight"]
        # The checkpoint holds [gate; up] as one tensor of twice the width.
        gate, up = weights[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        named |= {
            f"{theirs}self_attn.o_proj.weight": weights[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": weights[f"{ours}mlp.linear_fc2.weight"],
            f"{theirs}input_layernorm.weight": weights[f"{ours}self_attention.linear_qkv.layer_norm_weight"],
            f"{theirs}post_attention_layernorm.weight": weights[f"{ours}mlp.linear_fc1.layer_norm_weight"],
        }
    return named


def split_qkv(fused: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Megatron's fused projection has, for each group, its query heads, then its key, then its value."""
    groups, size = model.query_groups, model.attention_head_size
    heads = model.num_attention_heads // groups
    grouped = fused.view(groups, heads + 2, size, *fused.shape[1:])
    parts = grouped.split((heads, 1, 1), dim=1)
    return [part.reshape(-1, *fused.shape[1:]) for part in parts]


def batch(config: RunConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [b, s] of a global batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.training.global_batch_size, config.model.seq_length + 1)
    tokens = torch.randint(0, VOCAB_SIZE, shape, generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


# What the rank runs.


def weights_logits_and_losses(config: RunConfig) -> dict[str, Any]:
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        generator = torch.Generator().manual_seed(5)
        for weight in state.chunks[0].parameters():
            weight.data.add_(torch.empty_like(weight).normal_(0.0, 0.1, generator=generator))
        weights = whole_tensors(state, parallel, lambda weight: weight.detach())
        tokens = torch.cat([part["tokens"] for part in made_up_batch(config, 0, parallel)])
        with torch.no_grad():
            logits = state.chunks[0](input_ids=tokens, position_ids=None, attention_mask=None)[..., :VOCAB_SIZE]
        results = [
            train_step(state, made_up_batch(config, step, parallel), 3e-3, config, parallel, False)
            for step in range(20)
        ]
    return {
        "weights": weights,
        "logits": logits.contiguous(),
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
    }

"""Compute the logits of a Hugging Face model in fp64 by its formula, as the reference for other implementations.

    x = E[tokens]
    x = x + o(attention(rope(q(n_1 x)), rope(k(n_1 x)), v(n_1 x)))      for each layer
    x = x + down(silu(gate(n_2 x)) * up(n_2 x))
    logits = n x H^T                                                   with H = E if the two are tied

where n x = w * x / sqrt(mean(x^2) + epsilon). Qwen2 has a bias on queries, keys and values, and Qwen3 a norm per head
on queries and keys.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from megatron_step.config.model import ModelConfig
from megatron_step.config.yaml_json import read_json
from megatron_step.huggingface.architectures import model_config
from megatron_step.huggingface.peft_adapter import ADAPTER_CONFIG, ADAPTER_FILE, factor_names
from megatron_step.huggingface.safetensors_files import HFTensors

Read = Callable[[str], Tensor]


@torch.no_grad()
def reference_logits(folder: Path, adapter: Path | None, tokens: Tensor) -> Tensor:
    """Compute logits [b, s, v] in fp64, on the device of `tokens` [b, s], of the model in `folder`.

    `adapter` is the folder of a LoRA adapter on the model, or None. One layer's weights are in memory at a time.

    Raises the errors of `model_config` and `HFTensors`.
    """
    model, read = model_config(folder, tokens.shape[1]), _reader(folder, adapter, tokens.device)
    cosine, sine = _rotary(model, tokens)
    x = read("model.embed_tokens.weight")[tokens]  # [b, s, h]
    for layer in range(model.num_layers):

        def layer_weight(name: str, prefix: str = f"model.layers.{layer}.") -> Tensor:
            return read(prefix + name)

        x = x + _attention(_norm(x, layer_weight("input_layernorm.weight"), model), layer_weight, model, cosine, sine)
        y = _norm(x, layer_weight("post_attention_layernorm.weight"), model)
        gate, up = (y @ layer_weight(f"mlp.{name}_proj.weight").T for name in ("gate", "up"))  # [b, s, f]
        x = x + (silu(gate) * up) @ layer_weight("mlp.down_proj.weight").T
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    return _norm(x, read("model.norm.weight"), model) @ read(head).T


def _reader(folder: Path, adapter: Path | None, device: torch.device) -> Read:
    """Return a function from a weight's name to the weight, W or W + alpha / r B A, in fp64."""
    tensors = HFTensors(folder)
    if adapter is None:
        return lambda name: tensors[name].to(device, torch.float64)
    settings = read_json(adapter / ADAPTER_CONFIG)
    scaling = settings["lora_alpha"] / settings["r"]
    factors = safe_open(adapter / ADAPTER_FILE, framework="pt")
    adapted = set(factors.keys())

    def read(name: str) -> Tensor:
        weight = tensors[name].to(device, torch.float64)
        names = factor_names(name)
        if names[0] in adapted:
            a, b = (factors.get_tensor(factor).to(device, torch.float64) for factor in names)
            weight.addmm_(b, a, alpha=scaling)
        return weight

    return read


def _norm(x: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.norm_epsilon)


def _attention(x: Tensor, read: Read, model: ModelConfig, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply causal attention to x [b, s, h]; each key head serves a group of query heads."""
    projections = []
    for name in "qkv":
        y = x @ read(f"self_attn.{name}_proj.weight").T
        if model.qkv_bias:
            y = y + read(f"self_attn.{name}_proj.bias")
        y = y.unflatten(-1, (-1, model.attention_head_size)).transpose(1, 2)  # [b, heads, s, d]
        if name != "v":
            y = _norm(y, read(f"self_attn.{name}_norm.weight"), model) if model.qk_norm else y
            halves = y.chunk(2, -1)
            y = y * cosine + torch.cat((-halves[1], halves[0]), -1) * sine
        projections.append(y)
    query, key, value = projections
    mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)  # [b, heads, s, d]
    return mixed.transpose(1, 2).flatten(2) @ read("self_attn.o_proj.weight").T


def _rotary(model: ModelConfig, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [s, d] of every position and channel, with Llama-3's scaling of frequencies."""
    size, scaling = model.attention_head_size, model.rope_scaling
    channels = torch.arange(0, size, 2, dtype=torch.float64, device=tokens.device)
    frequency = model.rope_theta ** (-channels / size)  # [d / 2]
    if scaling.factor > 1.0:
        turns = scaling.original_max_position * frequency / (2 * math.pi)  # rotations within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angles = torch.arange(tokens.shape[1], dtype=torch.float64, device=tokens.device)[:, None] * frequency
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()

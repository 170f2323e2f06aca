"""Write a checkpoint's adapters as one LoRA adapter for `peft` (adapter_config.json, adapter_model.safetensors).

Where we fuse several Hugging Face weights (q, k, v; gate, up), W = [W_1; W_2; ...], each exported LoRA shares A and
gets its own rows of B:   W_i + alpha / rank B_i A.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_step.config.stages import AdapterConfig
from megatron_step.huggingface.hf_mapping import MappedWeight
from megatron_step.huggingface.safetensors_files import write_safetensors
from megatron_step.plan.names import factor_keys, layer_of

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Names of an adapter's files."""


def write_adapter(
    folder: Path,
    adapted: Sequence[MappedWeight],
    config: AdapterConfig,
    base_model: str,
    dtype: torch.dtype,
    read: Callable[[Sequence[str]], dict[str, Tensor]],
) -> None:
    """Write the adapters of the weights `adapted` into `folder`; `read` returns a checkpoint's tensors by keys."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in adapted:
        for name, (rows, columns) in weight.hf_shapes.items():
            a, b = factor_names(name)
            shapes |= {a: (config.rank, columns), b: (rows, config.rank)}
    factors = (_factors(weight, dtype, read) for weight in adapted)
    write_safetensors(folder / ADAPTER_FILE, shapes, dtype, factors)
    settings = _adapter_config(adapted, config, base_model)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _factors(
    weight: MappedWeight, dtype: torch.dtype, read: Callable[[Sequence[str]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return A [r, columns] and B [rows, r] for each Hugging Face tensor of a weight, by peft's names."""
    a_key, b_key = factor_keys(weight.key)
    factors = read([a_key, b_key])
    return {
        factor: tensor.to(dtype)
        for name, b in weight.split(factors[b_key]).items()
        for factor, tensor in zip(factor_names(name), (factors[a_key], b))
    }


def factor_names(weight: str) -> tuple[str, str]:
    """Return peft's names of A and B of the adapter on a Hugging Face weight."""
    linear = f"base_model.model.{weight.removesuffix('.weight')}"
    return f"{linear}.lora_A.weight", f"{linear}.lora_B.weight"


def _adapter_config(adapted: Sequence[MappedWeight], config: AdapterConfig, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({name.split(".")[-2] for weight in adapted for name in weight.names}),
        "layers_to_transform": sorted({layer_of(weight.key) for weight in adapted}),
        "layers_pattern": "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }

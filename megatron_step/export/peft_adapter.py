"""A checkpoint's adapters as one LoRA adapter that `peft` loads (adapter_config.json, adapter_model.safetensors).

Where our linear is made of several of theirs, with W = [W_1; W_2; ...], all have its A, and each the rows of B that are
its own:   W_i + alpha / rank B_i A.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_step.config.stages import AdapterConfig
from megatron_step.export.hf_mapping import MappedWeight
from megatron_step.export.new_folder import finish_file
from megatron_step.growth.weights import factor_keys
from megatron_step.planner.trainable import layer_of


def write_adapter(
    folder: Path,
    adapted: Sequence[MappedWeight],
    config: AdapterConfig,
    base_model: str,
    dtype: torch.dtype,
    read: Callable[[Sequence[str]], dict[str, Tensor]],
) -> None:
    """Write the adapters on the weights `adapted`, which `read` gives the tensors of by their keys, into `folder`."""
    tensors: dict[str, Tensor] = {}
    for weight in adapted:
        a_key, b_key = factor_keys(weight.key)
        factors = read([a_key, b_key])
        for name, b in weight.split(factors[b_key].to(dtype)).items():
            linear = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{linear}.lora_A.weight"] = factors[a_key].to(dtype, copy=True)
            tensors[f"{linear}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    finish_file(folder / "adapter_model.safetensors")
    settings = _adapter_config(adapted, config, base_model)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


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

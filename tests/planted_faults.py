"""Exports of a random checkpoint with adapters, and what can be wrong with one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import write_random_checkpoint
from safetensors.torch import load_file, save_file

from megatron_step.checkpoint.load import FoundCheckpoint, find_at
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.huggingface.to_hf import ExportOptions, export_model

Change = Callable[[dict[str, torch.Tensor]], None]


class Exports:
    """A checkpoint and its two exports: merged, and with its adapters apart."""

    def __init__(self, folder: Path, num_layers: int, precision: str) -> None:
        self.folder, self.num_layers = folder, num_layers
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.config: RunConfig = write_random_checkpoint(folder / "run", num_layers, precision)
        for name in ("merged", "apart"):
            export_model(folder / "run", folder / name, ExportOptions(adapter_only=name == "apart"))

    def found(self, parallel: Parallel) -> FoundCheckpoint:
        """The checkpoint."""
        return find_at(self.folder / "run", parallel)

    def copy(self, is_apart: bool, to: Path) -> tuple[Path, Path | None]:
        """A copy of an export, to spoil: the model's folder, and the adapter's."""
        shutil.copytree(self.folder / ("apart" if is_apart else "merged"), to)
        return (to / "base", to / "adapter") if is_apart else (to, None)


def _change(path: Path, change: Change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _set(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def leave_adapters_out(exports: Exports, model: Path, adapter: Path | None) -> None:
    """The model as it would be without them."""
    if adapter is None:
        shutil.copy(exports.folder / "apart/base/model.safetensors", model)
        return
    _change(
        adapter / "adapter_model.safetensors",
        lambda tensors: tensors.update({name: 0 * tensors[name] for name in tensors if "lora_B" in name}),
    )


def swap_layers(exports: Exports, model: Path, adapter: Path | None) -> None:
    """The first two layers in each other's place."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            other = name.replace(".layers.0.", ".layers.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    _change(model / "model.safetensors", swap)
    if adapter is not None:
        _change(adapter / "adapter_model.safetensors", swap)


def transpose(exports: Exports, model: Path, adapter: Path | None) -> None:
    """A square projection of a layer in the middle."""
    name = f"model.layers.{exports.num_layers // 2}.self_attn.o_proj.weight"
    _change(model / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].T}))


def rotate_otherwise(exports: Exports, model: Path, adapter: Path | None) -> None:
    """Change the base of the rotary embedding."""
    _set(model / "config.json", rope_theta=20000.0)


def miss_the_scale(exports: Exports, model: Path, adapter: Path | None) -> None:
    """Adapters without alpha / rank."""
    if adapter is not None:
        _set(adapter / "adapter_config.json", lora_alpha=exports.config.adapter.rank)
        return
    base = load_file(exports.folder / "apart/base/model.safetensors")
    merged = load_file(model / "model.safetensors")
    scaling = exports.config.adapter.alpha / exports.config.adapter.rank
    for name, tensor in merged.items():
        product = (tensor.float() - base[name].float()) / scaling
        merged[name] = (base[name].float() + product).to(tensor.dtype)
    save_file(merged, model / "model.safetensors", metadata={"format": "pt"})


FAULTS = (leave_adapters_out, swap_layers, transpose, rotate_otherwise, miss_the_scale)

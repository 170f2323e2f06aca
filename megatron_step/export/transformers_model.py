"""Loads a Hugging Face model's folder in transformers, whole or not at all."""

from pathlib import Path

import torch
from torch import nn

from megatron_step.export.safetensors_files import HFTensors


def load_in_transformers(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """The model in `folder`, in evaluation mode on the CPU; dtype "auto" is that of its files.

    Raises ValueError or FileNotFoundError if a file is missing or damaged, or lacks a tensor: transformers would fill
    it with random numbers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    HFTensors(folder)  # names the file that is missing or damaged
    disable_progress_bar()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    finally:
        enable_progress_bar()
    if loaded["missing_keys"]:
        raise ValueError(
            f"{folder} has no tensor {', '.join(sorted(loaded['missing_keys']))}, which its config.json needs"
        )
    whole: nn.Module = model.eval()
    return whole

"""Load a Hugging Face model's folder with transformers."""

from pathlib import Path

import torch
from torch import nn


def load_in_transformers(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """Load the model in `folder` in evaluation mode on the CPU; `dtype` "auto" takes the files' number format.

    transformers fills missing tensors with random numbers, so call `open_folder` first, which checks the tensors.

    Raises ValueError if transformers cannot load the model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # transformers raises errors of many classes
        raise ValueError(f"transformers cannot load {folder}: {' '.join(str(error).split())}") from error
    finally:
        enable_progress_bar()
    loaded: nn.Module = model.eval()
    return loaded

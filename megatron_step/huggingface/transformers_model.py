"""A Hugging Face model's folder in transformers."""

from pathlib import Path

import torch
from torch import nn


def load_in_transformers(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """The model in `folder`, in evaluation mode on the CPU; dtype "auto" is that of its files.

    What it lacks would be filled with random numbers: `open_folder` looks before.

    Raises ValueError if transformers does not load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # of many classes, the library's own and Python's
        raise ValueError(f"transformers does not load {folder}: {' '.join(str(error).split())}") from error
    finally:
        enable_progress_bar()
    loaded: nn.Module = model.eval()
    return loaded

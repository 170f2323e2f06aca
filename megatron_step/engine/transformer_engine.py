"""Check for TransformerEngine on this machine."""

from importlib.util import find_spec

import torch


def has_transformer_engine() -> bool:
    """Return whether TransformerEngine is installed and there is a CUDA device for it."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None

"""Whether TransformerEngine can be used on this machine."""

from importlib.util import find_spec

import torch


def has_transformer_engine() -> bool:
    """Whether TransformerEngine's layers can be used: it is installed, and there is a CUDA device for it."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None

"""What is installed beside megatron-core on this machine, and what torch does not document."""

import io
from importlib.util import find_spec
from typing import Any

import torch
from torch.distributed.checkpoint.utils import _create_file_view


def has_transformer_engine() -> bool:
    """Whether TransformerEngine's layers can be used: it is installed, and there is a CUDA device for it."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def file_view(file: io.IOBase, offset: int, length: int) -> Any:
    """A binary file that holds `length` bytes of `file` from `offset` on, as torch's checkpoint reader uses it."""
    return _create_file_view(file, offset, length)

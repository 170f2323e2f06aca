"""The device of this process."""

import torch


def current_device() -> torch.device:
    """Return the current CUDA device, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

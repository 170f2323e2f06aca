"""A process computes on its CUDA device where there is one, else on the CPU."""

import pytest
import torch

from megatron_step.engine.device import current_device


def test_the_device_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert current_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert current_device() == torch.device("cuda", 3)

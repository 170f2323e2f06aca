"""TransformerEngine counts only where its layers can run."""

import pytest
import torch

from megatron_step.engine import transformer_engine


@pytest.mark.parametrize(
    ("cuda", "installed", "usable"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_transformer_engine_needs_its_package_and_a_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, installed: bool, usable: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(transformer_engine, "find_spec", lambda name: object() if installed else None)
    assert transformer_engine.has_transformer_engine() is usable

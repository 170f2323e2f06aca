"""TransformerEngine counts only where its layers can run, and the private functions of torch do what we use."""

from pathlib import Path

import pytest
import torch

from megatron_step.engine import compat


@pytest.mark.parametrize(
    ("cuda", "installed", "usable"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_transformer_engine_needs_its_package_and_a_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, installed: bool, usable: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(compat, "find_spec", lambda name: object() if installed else None)
    assert compat.has_transformer_engine() is usable


def test_a_file_view_reads_its_bytes_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"0123456789")
    with (tmp_path / "bytes").open("rb", buffering=0) as file:
        view = compat.file_view(file, 3, 4)
        assert view.read() == b"3456"
        view.seek(1)
        assert view.read(2) == b"45"

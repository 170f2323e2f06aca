"""Every block of docs/python.md runs, one after the other, as a reader would type them."""

import re
import shutil
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

from megatron_step.config.data import DataConfig


def test_every_block_runs(tmp_path: Path, small_data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    (tmp_path / "data").mkdir()
    shutil.copy(small_data.tokenizer, tmp_path / "data" / "tokenizer.model")
    for path in Path(small_data.train[0][1]).parent.glob("corpus.*"):
        shutil.copy(path, tmp_path / "data" / f"train{path.suffix}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    assert (tmp_path / "models" / "first" / "config.json").is_file()
    assert "weight_norm" in (tmp_path / "runs" / "hook" / "metrics.jsonl").read_text()

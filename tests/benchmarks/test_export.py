from pathlib import Path

import pytest

from benchmarks import export
from benchmarks.configs import SMALL_MODEL


def test_speed_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PAUSE_SECONDS", 0.0)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {index} of word{index % 97} and some{index % 89}" for index in range(5000)))
    monkeypatch.setattr(export, "_VOCAB_SIZE", 300)
    rows = export.run(1, SMALL_MODEL, 1_000_000, str(text))
    copy, exported, memory = rows
    assert (copy["arm"], exported["arm"]) == ("copy of the files", "export")
    assert copy["ratio"] == 1.0
    assert exported["mib_per_second"] > 0
    assert 0.5 < memory["largest_shard_mib"] < 1
    assert 100 < memory["framework_mib"] < 2000
    assert memory["peak_mib"] < memory["framework_mib"] + 100

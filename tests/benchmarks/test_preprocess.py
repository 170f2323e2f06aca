from pathlib import Path

import pytest

from benchmarks import preprocess


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        f"paragraph {index} of a text with word{index % 97} and some{index % 89} more, {index * 7919}"
        for index in range(3000)
    )
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    monkeypatch.setattr(preprocess, "_VOCAB_SIZE", 320)
    monkeypatch.setattr(preprocess, "_SPEED_MIB", 1)
    monkeypatch.setattr(preprocess, "_MEMORY_MIB", (1, 2))
    rows = preprocess.run(2, [tmp_path / "text.txt"])
    speed, memory = rows[:2], rows[2:]
    assert [row["arm"] for row in speed] == ["plain loop", "megatron_step, 2 workers"]
    for row in speed:
        assert 0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"]
    assert speed[0]["ratio"] == 1.0
    assert [row["input_mib"] for row in memory] == [1, 2]
    assert all(20 < row["peak_mib"] < 2000 for row in memory)

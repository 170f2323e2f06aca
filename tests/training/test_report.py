"""Runs are compared by their metrics, and a folder without any is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_step.training.report import plot, read_run, table


def _write(folder: Path, steps: int) -> Path:
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": 1000 * step, "loss": 10.0 - step, "tokens_per_second": 100.0 * step}
        if step % 2 == 0:
            line |= {"validation_loss": 11.0 - step, "validation_perplexity": 42.125}
        if step == 2:
            line["memory"] = {"peak_bytes": 3 << 20}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "lo')  # the last one cut off
    return folder


def test_a_table_of_what_each_run_has_come_to(tmp_path: Path) -> None:
    runs = [read_run(_write(tmp_path / "first", 4)), read_run(_write(tmp_path / "other", 1))]
    heading, first, other = table(runs).splitlines()
    assert " ".join(heading.split()) == "run steps tokens loss validation loss perplexity peak memory tokens/s"
    assert first.split() == ["first", "4", "4,000", "7.5000", "7.0000", "42.12", "3", "MiB", "250"]
    assert other.split() == ["other", "1", "1,000", "9.0000", "-", "-", "-", "100"]
    assert len({len(line) for line in (heading, first, other)}) == 1, "columns are aligned"


def test_the_loss_is_the_mean_of_the_last_ten_steps(tmp_path: Path) -> None:
    run = read_run(_write(tmp_path / "run", 30))
    assert run.loss == pytest.approx(sum(10.0 - step for step in range(21, 31)) / 10)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot([read_run(_write(tmp_path / "first", 4)), read_run(_write(tmp_path / "other", 1))], tmp_path / "new/loss.png")
    with Image.open(tmp_path / "new/loss.png") as picture:
        assert picture.size == (1050, 675)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the output folder of a run"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"st')
    with pytest.raises(ValueError, match="holds no finished step"):
        read_run(tmp_path)

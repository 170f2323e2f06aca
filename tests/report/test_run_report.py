"""Runs are compared by their metrics, and a folder without any is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_step.report.run_report import comparison, plot, read_run, stage_table, table


def _write(folder: Path, steps: int) -> Path:
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "stage_index": step // 4, "tokens": 1000 * step, "loss": 10.0 - step}
        line["flops"] = 10**9 * step
        line["tokens_per_second"] = 100.0 * step
        if step % 2 == 0:
            line |= {"validation_loss": 11.0 - step, "validation_perplexity": 42.125}
        if step == 2:
            line["memory"] = {"peak_bytes": 3 << 20, "model_state_bytes": 2 << 20, "planned_bytes": 4 << 20}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "lo')  # the last one cut off
    return folder


def test_a_table_of_what_each_run_has_come_to(tmp_path: Path) -> None:
    runs = [read_run(_write(tmp_path / "first", 4)), read_run(_write(tmp_path / "other", 1))]
    heading, first, other = table(runs).splitlines()
    assert " ".join(heading.split()) == (
        "run steps tokens loss validation loss perplexity model states peak memory FLOPs time tokens/s"
    )
    # Steps of 1000 tokens at 100, 200, 300 and 400 tokens a second: 20.8 seconds.
    assert " ".join(first.split()) == "first 4 4,000 7.5000 7.0000 42.12 2.0 MiB 3.0 MiB 4.00e+09 21 s 250"
    assert " ".join(other.split()) == "other 1 1,000 9.0000 - - - - 1.00e+09 10 s 100"
    assert len({len(line) for line in (heading, first, other)}) == 1, "columns are aligned"


def test_runs_are_compared_with_the_last_one(tmp_path: Path) -> None:
    runs = [read_run(_write(tmp_path / name, steps)) for name, steps in (("first", 2), ("second", 1), ("base", 5))]
    assert comparison(runs).splitlines() == [
        "first, compared with base: perplexity +0.0%, 100% of its peak memory, 100% of its model states, 40% of its "
        "operations, 66% of its time",
        "second, compared with base: 20% of its operations, 44% of its time",
    ]


def test_a_table_of_every_stage(tmp_path: Path) -> None:
    runs = [read_run(_write(tmp_path / "first", 5)), read_run(_write(tmp_path / "other", 1))]
    heading, *rows = stage_table(runs).splitlines()
    assert " ".join(heading.split()) == "run stage steps perplexity model states peak memory planned peak step time"
    # Steps of 1000 tokens at 100, 200, ... tokens a second: 10, 5, 3.33, 2.5 and 2 seconds.
    assert [" ".join(row.split()) for row in rows] == [
        "first 1 3 42.12 2.0 MiB 3.0 MiB 4.0 MiB 5.000 s",
        "first 2 2 42.12 - - - 2.250 s",
        "other 1 1 - - - - 10.000 s",
    ]


def test_memory_of_an_older_run_may_lack_a_kind(tmp_path: Path) -> None:
    path = _write(tmp_path / "run", 3) / "metrics.jsonl"
    path.write_text(path.read_text().replace(', "planned_bytes": 4194304', ""))
    (stage,) = read_run(tmp_path / "run").stages
    assert (stage.memory("peak_bytes"), stage.memory("planned_bytes")) == (3 << 20, None)


def test_the_loss_is_the_mean_of_the_last_ten_steps(tmp_path: Path) -> None:
    run = read_run(_write(tmp_path / "run", 30))
    assert run.loss == pytest.approx(sum(10.0 - step for step in range(21, 31)) / 10)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot([read_run(_write(tmp_path / "first", 4)), read_run(_write(tmp_path / "other", 1))], tmp_path / "new/loss.png")
    with Image.open(tmp_path / "new/loss.png") as picture:
        assert picture.size == (1650, 780)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the output folder of a run"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"st')
    with pytest.raises(ValueError, match="holds no finished step"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"loss": "x"}, "loss"),
        ({"tokens": None}, "tokens"),
        ({"tokens_per_second": 0}, "tokens_per_second"),
        ({"memory": 5}, "memory"),
        ({"memory": {"planned_bytes": 1}}, "peak_bytes"),
        ({"validation_loss": 1.0}, "validation_perplexity"),
        ({"stage_index": 10**400}, "stage_index"),
    ],
)
def test_a_line_that_no_run_writes_is_named(tmp_path: Path, changed: dict, name: str) -> None:
    line = {"step": 1, "stage_index": 0, "loss": 5.0, "tokens": 100, "tokens_per_second": 10.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, **changed}) + "\n")
    with pytest.raises(ValueError, match=f"metrics.jsonl:2: {name} is .*, which no run writes"):
        read_run(tmp_path)

"""Measure arms in turns, and show rows of figures as tables and JSON."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from megatron_step.engine.files import atomic_write

Row = dict[str, Any]
"""A row of a table: `benchmark` names the table, and the other keys are its columns."""


def use_all_cores() -> int:
    """Give torch one thread for each core that this process may use, and return their number."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    return threads


def check_repeats(repeats: int) -> None:
    """Raise ValueError for fewer than one repeat."""
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {repeats}")


def interleave(
    arms: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    pause_seconds: float = 0.0,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Measure seconds of `repeats` calls of every arm, the arms in turns, so that a slow phase affects all arms.

    A pause of `pause_seconds` before each call removes effects of one arm on the next.

    Raises ValueError for fewer than one repeat.
    """
    check_repeats(repeats)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + repeats):
        for name, arm in arms.items():
            sleep(pause_seconds)
            start = clock()
            arm()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Return columns with the median of `values` and their 10th and 90th percentile: NAME, p10 and p90."""
    return {name: statistics.median(values), "p10": percentile(values, 0.1), "p90": percentile(values, 0.9)}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of `values` lies, interpolated linearly."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, with one table for each benchmark and set of columns."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        columns = [name for name in row if name != "benchmark"]
        groups.setdefault((row["benchmark"], *columns), []).append(row)
    return "\n\n".join(_one_table(title, columns, group) for (title, *columns), group in groups.items())


def _one_table(title: str, columns: list[str], rows: list[Row]) -> str:
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    numeric = [all(isinstance(row[column], (int, float)) for row in rows) for column in columns]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, numeric)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([title, *lines[:1], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def machine() -> dict[str, Any]:
    """Return facts about the machine and its software."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def write_json(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the machine and all rows to `path` atomically, as JSON."""
    atomic_write(Path(path), json.dumps({"machine": machine(), "rows": list(rows)}, indent=2) + "\n")

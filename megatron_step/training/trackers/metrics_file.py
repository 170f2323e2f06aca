"""metrics.jsonl: one line of JSON for each step."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_step.training.trackers.tracker import Metrics, TrackedRun
from megatron_step.training.trackers.waiting_file import WaitingFile


class MetricsFile:
    """Writes OUTPUT_DIR/metrics.jsonl, with all digits of each number.

    It first drops lines of steps after `run.first_step`, which an interrupted process left: they are trained again.
    """

    def __init__(self, run: TrackedRun) -> None:
        path = Path(run.config.output_dir) / "metrics.jsonl"
        self._file = WaitingFile(path, lambda path: _cut(path, run.first_step))

    def write(self, metrics: Metrics, shown: bool) -> None:
        """Add the line of a step."""
        self._file.add(json.dumps(metrics, default=_plain).encode() + b"\n")

    def close(self) -> None:
        """Write what still waits for room."""
        self._file.close()


def _plain(value: Any) -> float | str:
    """Convert a value that JSON does not know, such as a tensor, to a number or to text."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)


def _cut(path: Path, last_step: int) -> None:
    """Cut the file after the last whole line of a step up to `last_step`, in place, since the disk may be full."""
    end = position = 0
    with path.open("rb") as lines:
        for line in lines:
            position += len(line)
            if line.endswith(b"\n") and _step(line) <= last_step:
                end = position
    if end < position:
        os.truncate(path, end)


def _step(line: bytes) -> float:
    """Return the step of a line; infinity for a line that a crash cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

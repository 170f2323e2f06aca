"""What runs have come to, side by side: a table and a plot of the lines in their metrics.jsonl."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

_LAST_STEPS = 10


@dataclass(frozen=True)
class RunReport:
    """A run's metrics, and what they come to."""

    name: str
    """Name of the run's folder."""
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl, one a step."""

    @property
    def loss(self) -> float:
        """Mean training loss of the last steps, in nats per token: a single step's depends on its batch."""
        return mean(line["loss"] for line in self.lines[-_LAST_STEPS:])

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps."""
        return median(line["tokens_per_second"] for line in self.lines)

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The lines with a validation loss."""
        return [line for line in self.lines if "validation_loss" in line]

    @property
    def peak_bytes(self) -> int | None:
        """Largest measured peak memory of a rank."""
        return max((line["memory"]["peak_bytes"] for line in self.lines if "memory" in line), default=None)


def read_run(folder: Path) -> RunReport:
    """The metrics of the run in `folder`.

    Raises FileNotFoundError if there are none, and ValueError if the file holds no finished step.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the output folder of a run: it has no metrics.jsonl")
    lines = [line for text in path.read_text(encoding="utf-8").splitlines() if (line := _metrics(text)) is not None]
    if not lines:
        raise ValueError(f"{path} holds no finished step")
    return RunReport(folder.resolve().name, lines)


def _metrics(text: str) -> dict[str, Any] | None:
    """A line's metrics; None for one that a run being stopped cut off."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def table(runs: list[RunReport]) -> str:
    """One line a run, under a heading."""
    heading = ["run", "steps", "tokens", "loss", "validation loss", "perplexity", "peak memory", "tokens/s"]
    rows = [heading, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    return "\n".join(
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths)) for row in rows)
    )


def _row(run: RunReport) -> list[str]:
    last = run.lines[-1]
    evaluated = run.evaluated[-1] if run.evaluated else None
    return [
        run.name,
        f"{last['step']:,}",
        f"{last['tokens']:,}",
        f"{run.loss:.4f}",
        f"{evaluated['validation_loss']:.4f}" if evaluated else "-",
        f"{evaluated['validation_perplexity']:.2f}" if evaluated else "-",
        f"{run.peak_bytes / 2**20:,.0f} MiB" if run.peak_bytes is not None else "-",
        f"{run.tokens_per_second:,.0f}",
    ]


def plot(runs: list[RunReport], path: Path) -> None:
    """Draw training and validation loss over the tokens seen, into a PNG file that appears when it is complete."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, run in enumerate(runs):
        color = f"C{index}"
        axes.plot(
            [line["tokens"] for line in run.lines], [line["loss"] for line in run.lines], color=color, alpha=0.35, lw=1
        )
        tokens = [line["tokens"] for line in run.evaluated]
        losses = [line["validation_loss"] for line in run.evaluated]
        axes.plot(tokens, losses, color=color, marker="o", ms=4, label=f"{run.name}, validation")
        axes.plot([], [], color=color, alpha=0.35, label=f"{run.name}, training")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)

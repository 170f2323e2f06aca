"""Comparison of runs: tables and a plot from their metrics.jsonl."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from megatron_step.config.sections import in_short
from megatron_step.engine.files import whole_file
from megatron_step.report.text_table import aligned, format_bytes

_LAST_STEPS = 10


@dataclass(frozen=True)
class RunReport:
    """A run's metrics and their summary."""

    name: str
    """Name of the run's folder."""
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl, one per step."""

    @property
    def loss(self) -> float:
        """Mean training loss of the last steps, in nats per token; one step's loss depends on its batch."""
        return mean(line["loss"] for line in self.lines[-_LAST_STEPS:])

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps of the tokens per second."""
        return median(line["tokens_per_second"] for line in self.lines)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without evaluations and saves."""
        return sum(_step_seconds(self.lines, 0))

    @property
    def flops(self) -> int | None:
        """Floating-point operations of the run by formula, without recomputed ones; None in an older run's metrics."""
        return self.lines[-1].get("flops")

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The lines with a validation loss."""
        return [line for line in self.lines if "validation_loss" in line]

    @property
    def peak_bytes(self) -> int | None:
        """Largest measured peak memory of a rank."""
        return self._largest("peak_bytes")

    @property
    def model_state_bytes(self) -> int | None:
        """Largest weights, gradients and optimizer states of a rank."""
        return self._largest("model_state_bytes")

    def _largest(self, name: str) -> int | None:
        return max((line["memory"][name] for line in self.lines if name in line.get("memory", {})), default=None)

    @property
    def stages(self) -> list["StageReport"]:
        """The metrics of each growth stage, in order."""
        stages: list[StageReport] = []
        for index in sorted({line["stage_index"] for line in self.lines}):
            seen = stages[-1].lines[-1]["tokens"] if stages else 0
            stages.append(StageReport(index, [line for line in self.lines if line["stage_index"] == index], seen))
        return stages


@dataclass(frozen=True)
class StageReport:
    """A growth stage's metrics."""

    index: int
    """The stage's index, from 0."""
    lines: list[dict[str, Any]]
    """The lines of the stage's steps."""
    tokens_before: int
    """Tokens that the run had seen when the stage began."""

    @property
    def number(self) -> int:
        """The stage's number for people, from 1."""
        return self.index + 1

    @property
    def seconds(self) -> float:
        """Median seconds of a step."""
        return median(_step_seconds(self.lines, self.tokens_before))

    def memory(self, name: str) -> int | None:
        """Return the largest value of `name`, in bytes, over the stage's lines; None if it was not measured."""
        return max((line["memory"][name] for line in self.lines if name in line.get("memory", {})), default=None)


def _step_seconds(lines: list[dict[str, Any]], tokens_before: int) -> list[float]:
    """Return the seconds of the step of each line."""
    tokens = [tokens_before, *(line["tokens"] for line in lines)]
    return [(end - start) / line["tokens_per_second"] for start, end, line in zip(tokens, tokens[1:], lines)]


def read_run(folder: Path) -> RunReport:
    """Read the metrics of the run in `folder`.

    Raises FileNotFoundError if `folder` has no metrics.jsonl, and ValueError if the file holds no finished step.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the output folder of a run: it has no metrics.jsonl")
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for number, text in enumerate(texts, 1) if (line := _metrics(f"{path}:{number}", text)) is not None]
    if not lines:
        raise ValueError(f"{path} holds no finished step: wait until the run has trained a step")
    return RunReport(folder.resolve().name, lines)


def metrics_of_checkpoint(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the metrics of a checkpoint's run, or of the run whose output folder is given; [] without metrics.jsonl.

    Raises ValueError if the file holds no finished step.
    """
    run = checkpoint if (checkpoint / "checkpoints").is_dir() else checkpoint.absolute().parent.parent
    return read_run(run).lines if (run / "metrics.jsonl").is_file() else []


def _metrics(place: str, text: str) -> dict[str, Any] | None:
    """Return a line's metrics; None for a line that was cut off when the run stopped.

    Raises ValueError for a complete line with a value that no run writes.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(line, dict) and "step" in line):
        return None
    memory = line.get("memory", {})
    numbers = {name: line.get(name) for name in _MEASURED}
    numbers |= {name: line[name] for name in ("validation_loss", "validation_perplexity", "flops") if name in line}
    numbers |= (
        {name: memory[name] for name in _BYTES if name in memory} if isinstance(memory, dict) else {"memory": memory}
    )
    wrong = next((name for name, value in numbers.items() if not _is_number(value)), None)
    if wrong is None and not isinstance(memory, dict):
        wrong = "memory"
    if wrong is None and "memory" in line and "peak_bytes" not in memory:
        wrong = "peak_bytes"
    if wrong is None and "validation_loss" in line and "validation_perplexity" not in line:
        wrong = "validation_perplexity"
    if wrong is None and not line["tokens_per_second"] > 0:
        wrong = "tokens_per_second"
    if wrong is not None:
        raise ValueError(f"{place}: {wrong} is {in_short(numbers.get(wrong))}, which no run writes: remove the line")
    return line


_MEASURED = ("step", "stage_index", "loss", "tokens", "tokens_per_second")
_BYTES = ("planned_bytes", "model_state_bytes", "peak_bytes")
_LARGEST = 1e300


def _is_number(value: Any) -> bool:
    """Return whether a value is a usable number; a loss may be infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < _LARGEST


def table(runs: list[RunReport]) -> str:
    """Return a table with one line per run."""
    heading = ["run", "steps", "tokens", "loss", "validation loss", "perplexity"]
    heading += ["model states", "peak memory", "FLOPs", "time", "tokens/s"]
    return aligned([heading, *(_row(run) for run in runs)])


def comparison(runs: list[RunReport]) -> str:
    """Return a line for each run but the last, which says how it differs from the last one."""
    base = runs[-1]
    return "\n".join(f"{run.name}, compared with {base.name}: {_compared(run, base)}" for run in runs[:-1])


def _compared(run: RunReport, base: RunReport) -> str:
    parts = []
    if run.evaluated and base.evaluated:
        ratio = run.evaluated[-1]["validation_perplexity"] / base.evaluated[-1]["validation_perplexity"]
        parts.append(f"perplexity {ratio - 1:+.1%}")
    for name in ("peak_bytes", "model_state_bytes", "flops", "seconds"):
        value, whole = getattr(run, name), getattr(base, name)
        if value and whole:
            parts.append(f"{value / whole:.0%} of its {_COMPARED[name]}")
    return ", ".join(parts)


_COMPARED = {
    "peak_bytes": "peak memory",
    "model_state_bytes": "model states",
    "flops": "operations",
    "seconds": "time",
}


def stage_table(runs: list[RunReport]) -> str:
    """Return a table with one line for each growth stage of each run."""
    heading = ["run", "stage", "steps", "perplexity", "model states", "peak memory", "planned peak", "step time"]
    return aligned([heading, *(_stage_row(run, stage) for run in runs for stage in run.stages)])


def _stage_row(run: RunReport, stage: StageReport) -> list[str]:
    evaluated = [line for line in stage.lines if "validation_loss" in line]
    memory = [stage.memory(name) for name in ("model_state_bytes", "peak_bytes", "planned_bytes")]
    return [
        run.name,
        str(stage.number),
        f"{len(stage.lines):,}",
        f"{evaluated[-1]['validation_perplexity']:.2f}" if evaluated else "-",
        *(_bytes(nbytes) for nbytes in memory),
        f"{stage.seconds:.3f} s",
    ]


def _bytes(count: int | None) -> str:
    return format_bytes(count) if count is not None else "-"


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
        _bytes(run.model_state_bytes),
        _bytes(run.peak_bytes),
        f"{run.flops:.2e}" if run.flops else "-",
        f"{run.seconds:,.0f} s",
        f"{run.tokens_per_second:,.0f}",
    ]


def plot(runs: list[RunReport], path: Path) -> None:
    """Plot losses and memory of the stages over the tokens seen, and write the figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    losses, memory = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        _plot_losses(losses, run, f"C{index}")
        _plot_memory(memory, run, f"C{index}")
    losses.set_ylabel("loss (nats per token)")
    memory.set_ylabel("memory of the fullest rank (MiB)")
    memory.set_ylim(bottom=0)
    for axes in (losses, memory):
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _plot_losses(axes: Any, run: RunReport, color: str) -> None:
    tokens = [line["tokens"] for line in run.lines]
    axes.plot(tokens, [line["loss"] for line in run.lines], color=color, alpha=0.35, lw=1)
    tokens = [line["tokens"] for line in run.evaluated]
    axes.plot(
        tokens,
        [line["validation_loss"] for line in run.evaluated],
        color=color,
        marker="o",
        ms=4,
        label=f"{run.name}, validation",
    )
    axes.plot([], [], color=color, alpha=0.35, label=f"{run.name}, training")


def _plot_memory(axes: Any, run: RunReport, color: str) -> None:
    """Plot peak memory and model states, constant within each stage (STEP, Yano et al., 2025, Figure 2)."""
    ends = [0, *(stage.lines[-1]["tokens"] for stage in run.stages)]
    for name, style, label in (("peak_bytes", "-", "peak"), ("model_state_bytes", "--", "model states")):
        levels = [level / 2**20 for stage in run.stages if (level := stage.memory(name)) is not None]
        if len(levels) == len(run.stages):
            axes.stairs(levels, ends, color=color, ls=style, lw=2, label=f"{run.name}, {label}")

"""A figure of a comparison: perplexity of each arm against its model states and against its operations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_step.compare.results import ArmSummary, Result, summaries
from megatron_step.engine.files import whole_file


def draw(results: Sequence[Result], path: Path) -> None:
    """Write the figure of `results` as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    states, operations = figure.subplots(1, 2, sharey=True)
    for index, arm in enumerate(summaries(results)):
        one = arm.results[0]
        _point(states, arm, one.model_state_bytes / 2**20, f"C{index}")
        _point(operations, arm, one.flops / 1e12, f"C{index}")
    states.set_ylabel("validation perplexity")
    states.set_xlabel("model states of the fullest rank (MiB)")
    operations.set_xlabel("operations of the run (TFLOP)")
    for axes in (states, operations):
        axes.set_xlim(left=0)
        axes.margins(x=0.2, y=0.15)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _point(axes: Any, arm: ArmSummary, x: float, color: str) -> None:
    axes.errorbar([x], [arm.perplexity], yerr=arm.spread, fmt="o", color=color, capsize=4)
    axes.annotate(arm.name, (x, arm.perplexity), xytext=(6, 6), textcoords="offset points")

"""The numbers of a step that are plotted."""

from typing import Any

from megatron_step.training.trackers.tracker import Metrics


def is_plotted(metrics: Metrics, shown: bool) -> bool:
    """Return whether a step is plotted: it is if it is shown or evaluated."""
    return shown or "validation_loss" in metrics


def scalars(metrics: Metrics) -> dict[str, float]:
    """Return the numbers of a step, by the names of their plots."""
    found = {name: value for name, value in metrics.items() if isinstance(value, float)}
    memory: dict[str, Any] = metrics.get("memory", {})
    found.update({f"memory/{name}": value for name, value in memory.items() if isinstance(value, int)})
    return found

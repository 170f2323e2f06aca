"""The progress of a run: a bar on a terminal, otherwise a line for each shown step."""

import sys

from tqdm import tqdm

from megatron_step.engine.messages import say
from megatron_step.training.trackers.tracker import Metrics, TrackedRun


class ProgressLines:
    """Prints a line for each shown step."""

    def __init__(self, run: TrackedRun) -> None:
        self._num_steps = run.num_steps

    def write(self, metrics: Metrics, shown: bool) -> None:
        """Print the line of a shown step."""
        if shown:
            say(progress_line(metrics, self._num_steps))

    def close(self) -> None:
        """Do nothing: every line is printed."""


class ProgressBar:
    """A bar on the terminal, with a line for each evaluation."""

    def __init__(self, run: TrackedRun) -> None:
        self._num_steps = run.num_steps
        self._bar = tqdm(total=run.num_steps, initial=run.first_step, unit="step", dynamic_ncols=True)

    def write(self, metrics: Metrics, shown: bool) -> None:
        """Move the bar to the step."""
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {speed}", refresh=False)
        self._bar.update(metrics["step"] - self._bar.n)
        if "validation_loss" in metrics:
            self._bar.write(progress_line(metrics, self._num_steps))

    def close(self) -> None:
        """Close the bar, and leave it on the screen."""
        self._bar.close()


def progress(run: TrackedRun) -> ProgressLines | ProgressBar:
    """Return a bar if standard error is a terminal, otherwise lines."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return ProgressBar(run) if is_terminal else ProgressLines(run)


def progress_line(metrics: Metrics, num_steps: int) -> str:
    """Return the metrics of a step for people, in one line."""
    parts = [
        f"step {metrics['step']}/{num_steps}",
        f"loss {metrics['loss']:.4f}",
        f"learning rate {metrics['learning_rate']:.2e}",
        f"gradient norm {metrics['grad_norm']:.3f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"{metrics['tflops_per_second']:.3g} TFLOP/s",
    ]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if "memory" in metrics:
        parts.append(f"peak memory {metrics['memory']['peak_bytes'] / 2**20:,.0f} MiB")
    if "validation_loss" in metrics:
        parts.append(f"validation loss {metrics['validation_loss']:.4f}")
        parts.append(f"perplexity {metrics['validation_perplexity']:.2f}")
    return " | ".join(parts)

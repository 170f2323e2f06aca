"""Results of a comparison: the end of each run, a file of them, and a table with the spread over seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from megatron_step.compare.arms import ArmRun
from megatron_step.config.yaml_json import read_json
from megatron_step.engine.files import atomic_write
from megatron_step.report.run_report import read_run
from megatron_step.report.text_table import aligned, format_bytes


@dataclass(frozen=True)
class Result:
    """The end of a run."""

    arm: str
    """Name of the arm."""
    learning_rate: float
    """Peak learning rate."""
    seed: int
    """Seed of the initial weights and of the order of the data."""
    tokens: int
    """Tokens that the run trained on."""
    validation_loss: float
    """Loss on the validation text at the end, in nats per token."""
    perplexity: float
    """Perplexity on the validation text at the end."""
    model_state_bytes: int
    """Largest weights, gradients and optimizer states of a rank."""
    peak_bytes: int
    """Largest measured peak of a rank."""
    flops: int
    """Operations of the run, by formula."""
    seconds: float
    """Seconds of all its steps."""


@dataclass(frozen=True)
class ArmSummary:
    """The results of an arm at its best learning rate."""

    name: str
    """Name of the arm."""
    results: tuple[Result, ...]
    """A result for each seed."""

    @property
    def perplexity(self) -> float:
        """Mean over the seeds."""
        return mean(result.perplexity for result in self.results)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the perplexity over the seeds; None for one seed."""
        values = [result.perplexity for result in self.results]
        return stdev(values) if len(values) > 1 else None

    def difference(self, base: "ArmSummary") -> tuple[float, float | None] | None:
        """Return the mean relative difference of the perplexity to `base`, paired by seed, and its standard error.

        The error is None for one common seed; the whole is None without one.
        """
        other = {result.seed: result.perplexity for result in base.results}
        pairs = [result.perplexity / other[result.seed] - 1 for result in self.results if result.seed in other]
        if not pairs:
            return None
        return mean(pairs), stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None


def result_of(run: ArmRun) -> Result:
    """Return the result of a finished run.

    Raises ValueError if its metrics lack the last evaluation or the memory.
    """
    report = read_run(run.folder)
    last = report.lines[-1]
    states, peak, flops = report.model_state_bytes, report.peak_bytes, report.flops
    if "validation_loss" not in last or states is None or peak is None or flops is None:
        raise ValueError(f"{run.folder}/metrics.jsonl lacks the last evaluation or the memory: remove {run.folder}")
    return Result(
        run.arm,
        run.learning_rate,
        run.seed,
        last["tokens"],
        last["validation_loss"],
        last["validation_perplexity"],
        states,
        peak,
        flops,
        report.seconds,
    )


def summaries(results: Sequence[Result]) -> list[ArmSummary]:
    """Return each arm at its best learning rate: the one with the lowest perplexity at the first seed."""
    found = []
    for arm in dict.fromkeys(result.arm for result in results):
        own = [result for result in results if result.arm == arm]
        first = min(result.seed for result in own)
        best = min((result for result in own if result.seed == first), key=lambda result: result.perplexity)
        chosen = [result for result in own if result.learning_rate == best.learning_rate]
        found.append(ArmSummary(arm, tuple(sorted(chosen, key=lambda result: result.seed))))
    return found


def table(results: Sequence[Result]) -> str:
    """Return a table with a line for each arm, compared with the first one."""
    arms = summaries(results)
    base = arms[0]
    rows = [["arm", "rate", "seeds", "perplexity", f"to {base.name}", "model states", "peak memory", "FLOPs", "time"]]
    for arm in arms:
        one, whole = arm.results[0], base.results[0]
        rows.append(
            [
                arm.name,
                f"{one.learning_rate:g}",
                str(len(arm.results)),
                _with_error(arm.perplexity, arm.spread, ".2f"),
                _percent(arm.difference(base)) if arm is not base else "",
                f"{format_bytes(one.model_state_bytes)} ({one.model_state_bytes / whole.model_state_bytes:.0%})",
                f"{format_bytes(one.peak_bytes)} ({one.peak_bytes / whole.peak_bytes:.0%})",
                f"{one.flops:.2e} ({one.flops / whole.flops:.0%})",
                f"{mean(result.seconds for result in arm.results):,.0f} s",
            ]
        )
    return aligned(rows)


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _percent(difference: tuple[float, float | None] | None) -> str:
    if difference is None:
        return "-"
    value, error = difference
    return f"{100 * value:+.2f}" + ("" if error is None else f" ± {100 * error:.2f}") + " %"


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write results as JSON."""
    atomic_write(path, json.dumps([asdict(result) for result in results], indent=1))


def read_results(path: Path) -> list[Result]:
    """Read the results that `write_results` wrote.

    Raises ValueError if the file holds no such results, and OSError if it cannot be read.
    """
    rows = read_json(path)
    names = {field.name for field in fields(Result)}
    if not isinstance(rows, list) or not rows or any(not isinstance(row, dict) or set(row) != names for row in rows):
        raise ValueError(f"{path} does not hold the results of a comparison: name the results.json of one")
    return [Result(**row) for row in rows]

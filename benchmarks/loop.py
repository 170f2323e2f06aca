"""Cost of the training loop beside the step: reading batches, metrics, hooks and files."""

import contextlib
import io
import random
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

from benchmarks.configs import MODEL, SMALL_MODEL, run_config
from benchmarks.timing import Row, check_repeats, percentile, use_all_cores
from megatron_step.config.data import DataConfig
from megatron_step.config.model import ModelConfig
from megatron_step.data.preprocess import preprocess
from megatron_step.data.train_tokenizer import train_tokenizer
from megatron_step.training import stage
from megatron_step.training.run import run as train
from megatron_step.training.step import train_step

_FIRST = 3  # number of first steps that do not count, since the run measures memory in its second step
_SMALL_STEPS = 20  # steps of the small model per step of the large one
_TOKENIZER_SIZE = 400


def run(
    repeats: int, model: ModelConfig = MODEL, micro_batch_size: int = 4, small: ModelConfig = SMALL_MODEL
) -> list[Row]:
    """Return a row for `model` and one for `small`: time of a step within a run, and time that the loop adds.

    The run is an ordinary one, with data, metrics.jsonl and TensorBoard. It saves only at its end and does not
    evaluate, since these are separate work.

    Raises RuntimeError if a signal stops the run.
    """
    check_repeats(repeats)
    use_all_cores()
    with tempfile.TemporaryDirectory() as folder:
        data = write_corpus(Path(folder))
        return [
            _row("train benchmark's model", model, micro_batch_size, repeats, data, f"{folder}/large"),
            _row("small model", small, micro_batch_size, _SMALL_STEPS * repeats, data, f"{folder}/small"),
        ]


def _row(name: str, model: ModelConfig, micro_batch_size: int, steps: int, data: DataConfig, output_dir: str) -> Row:
    config = run_config(model, micro_batch_size, "bf16", steps=steps + _FIRST + 1, output_dir=output_dir, data=data)
    spans: list[tuple[float, float]] = []  # start and end of each step

    def timed(*args: Any) -> Any:
        begin = perf_counter()
        result = train_step(*args)
        spans.append((begin, perf_counter()))
        return result

    with patch.object(stage, "train_step", timed), contextlib.redirect_stdout(io.StringIO()):
        finished = train(config)
    if not finished:
        raise RuntimeError("a signal stopped the run before its end: start the benchmark again")
    inside = [1e3 * (end - begin) for begin, end in spans[_FIRST:-1]]
    # From the end of a step to the start of the next one; the last step ends the run.
    between = [1e3 * (following[0] - step[1]) for step, following in zip(spans[_FIRST:], spans[_FIRST + 1 :])]
    return {
        "benchmark": "training loop beside the step (bf16)",
        "model": name,
        "steps": steps,
        "step_milliseconds": statistics.median(inside),
        "loop_milliseconds": statistics.median(between),
        "p10": percentile(between, 0.1),
        "p90": percentile(between, 0.9),
        "mean": statistics.fmean(between),
        "share": sum(between) / (sum(between) + sum(inside)),
    }


def write_corpus(folder: Path) -> DataConfig:
    """Write a tokenized corpus of random words into `folder`, and return the config of its data."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(1, 9))) for _ in range(2000)]
    lines = [" ".join(chance.choices(words, k=50)) for _ in range(2000)]
    text, tokenizer, prefix = folder / "text.txt", str(folder / "tokenizer.model"), str(folder / "corpus")
    text.write_text("\n\n".join(lines), encoding="utf-8")
    train_tokenizer([text], tokenizer, _TOKENIZER_SIZE)
    preprocess([text], prefix, tokenizer, separator="\n\n", workers=1)
    return DataConfig(train=[(1.0, prefix)], tokenizer=tokenizer)

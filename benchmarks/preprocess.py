"""Preprocessing: tokens per second compared with a plain loop, and peak memory for two sizes of input."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.process_memory import process_peak_bytes
from megatron_step.data.preprocess import preprocess
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.data.train_tokenizer import train_tokenizer

_WORKERS = 2
_VOCAB_SIZE = 8192
_SPEED_MIB = 32
_MEMORY_MIB = (16, 64)


def run(repeats: int, texts: Sequence[str | Path] = ("examples/data/austen.txt",)) -> list[dict[str, Any]]:
    """Return rows of two tables: speed (medians and extremes of `repeats` interleaved runs) and peak memory.

    The input is a .jsonl file of the paragraphs of `texts`, repeated up to the input's size.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_path = f"{folder}/tokenizer.model"
        train_tokenizer(texts, tokenizer_path, _VOCAB_SIZE)
        inputs = {size: _write_input(texts, Path(folder), size) for size in {_SPEED_MIB, *_MEMORY_MIB}}
        return [
            *preprocess_benchmark(inputs[_SPEED_MIB], tokenizer_path, folder, repeats),
            *(_memory_row(inputs[size], tokenizer_path, folder, size) for size in _MEMORY_MIB),
        ]


def preprocess_benchmark(source: Path, tokenizer_path: str, folder: str, repeats: int) -> list[dict[str, Any]]:
    """Return rows with tokens per second of both arms in turns, with the start and the end of workers.

    Raises RuntimeError if the arms write different files.
    """
    arms: dict[str, Callable[[], int]] = {
        "plain loop": lambda: _plain_loop(source, tokenizer_path, f"{folder}/plain"),
        f"megatron_step, {_WORKERS} workers": lambda: (
            preprocess([source], f"{folder}/ours", tokenizer_path, workers=_WORKERS).tokens
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            start = time.perf_counter()
            tokens = arm()
            speeds[name].append(tokens / (time.perf_counter() - start))
    for suffix in ("bin", "idx"):
        if Path(f"{folder}/plain.{suffix}").read_bytes() != Path(f"{folder}/ours.{suffix}").read_bytes():
            raise RuntimeError(f"the two arms wrote different .{suffix} files")
    plain = statistics.median(speeds["plain loop"])
    return [
        {
            "benchmark": "preprocess speed",
            "arm": name,
            "input_mib": _SPEED_MIB,
            "tokens_per_second": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "repeats": repeats,
            "ratio": statistics.median(values) / plain,
        }
        for name, values in speeds.items()
    ]


def _plain_loop(source: Path, tokenizer_path: str, prefix: str) -> int:
    """Tokenize one document at a time and write it with megatron-core's builder; return the number of tokens."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = load_tokenizer(tokenizer_path)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    tokens = 0
    with source.open(encoding="utf-8") as file:
        for line in file:
            ids = [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod_id]
            builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens


def _memory_row(source: Path, tokenizer_path: str, folder: str, size_mib: int) -> dict[str, Any]:
    """Return a row with the peak memory of preprocessing and its workers, in a separate process."""
    arguments = ([source], f"{folder}/memory", tokenizer_path, "text", None, False, _WORKERS)
    return {
        "benchmark": "preprocess memory",
        "arm": f"megatron_step, {_WORKERS} workers",
        "input_mib": size_mib,
        "peak_mib": process_peak_bytes(preprocess, arguments) / 2**20,
    }


def _write_input(texts: Sequence[str | Path], folder: Path, size_mib: int) -> Path:
    paragraphs = [
        block for text in texts for block in Path(text).read_text(encoding="utf-8").split("\n\n") if block.strip()
    ]
    lines = [json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs]
    path = folder / f"input_{size_mib}.jsonl"
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size_mib << 20:
            for line in lines:
                written += file.write(line)
    return path

"""Export of a large model: speed relative to a copy of its files, and memory relative to the largest shard.

The checkpoint has random weights in bf16 and no optimizer states, since an export does not read them. The copy thus
reads and writes the same bytes as the export.
"""

import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.configs import SMALL_MODEL, run_config
from benchmarks.process_memory import process_peak_bytes
from benchmarks.timing import Row, interleave, spread
from megatron_step.checkpoint.streamed import write_streamed
from megatron_step.config.data import DataConfig
from megatron_step.config.model import ModelConfig
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.data.train_tokenizer import train_tokenizer
from megatron_step.huggingface.hf_mapping import hf_mapping
from megatron_step.huggingface.new_folder import new_folder
from megatron_step.huggingface.to_hf import ExportOptions, export_model
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan

MODEL = ModelConfig(
    num_layers=22,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=32,
    num_query_groups=4,
    seq_length=2048,
    vocab_size=32000,
)
"""A model of 1.1 billion weights, in the shape of TinyLlama."""
_VOCAB_SIZE = 1000  # tokens of the model's tokenizer
_PAUSE_SECONDS = 3.0  # pause before each arm, so that the page cache of removed files is free
_MEBIBYTE = 2**20


def run(
    repeats: int, model: ModelConfig = MODEL, shard_bytes: int = 1_000_000_000, text: str = "examples/data/sotu.txt"
) -> list[Row]:
    """Return rows of two tables: speed of `repeats` interleaved exports and copies, and peak memory.

    `text` is a file on which the model's tokenizer is trained.
    """
    options = ExportOptions(max_shard_bytes=shard_bytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer([text], folder / "tokenizer.model", _VOCAB_SIZE)
        checkpoint = write_random(folder / "checkpoint", model, folder / "tokenizer.model")
        small = write_random(folder / "small", replace(SMALL_MODEL, vocab_size=1024), folder / "tokenizer.model")
        shards = folder / "shards"
        export_model(checkpoint, shards, options)
        largest = max(path.stat().st_size for path in shards.glob("*.safetensors"))
        shutil.rmtree(shards)
        framework_bytes, peak_bytes = (
            process_peak_bytes(export_model, (path, folder / f"{path.parent.name}_exported", options))
            for path in (small, checkpoint)
        )
        for path in folder.glob("*_exported"):
            shutil.rmtree(path)
        return [*_speed_rows(checkpoint, folder, options, repeats), _memory_row(framework_bytes, peak_bytes, largest)]


def write_random(folder: Path, model: ModelConfig, tokenizer: Path) -> Path:
    """Write a checkpoint in bf16 with random weights, and return its path."""
    assert model.vocab_size is not None
    data = DataConfig(train=[(1.0, "unknown")], tokenizer=str(tokenizer))
    config = run_config(model, 1, "bf16", data=data)
    shapes = {weight.key: (weight.shape, torch.bfloat16) for weight in hf_mapping(model, model.vocab_size)}

    def draw(key: str) -> Tensor:
        return torch.empty(shapes[key][0], dtype=torch.bfloat16).normal_(0.0, 0.02)

    description = {
        "stage_index": 0,
        "consumed_samples": 0,
        "vocab_size": model.vocab_size,
        "config": asdict(config),
        "plan": make_plan(resolve(config, model.vocab_size)).to_dict(),
        "data_fingerprint": {"tokenizer": load_tokenizer(tokenizer).fingerprint},
        "layout": {},
    }
    return write_streamed(folder, shapes, draw, description)


def _speed_rows(checkpoint: Path, folder: Path, options: ExportOptions, repeats: int) -> list[Row]:
    def copy() -> None:
        with new_folder(folder / "copied", 0) as copied:
            shutil.copytree(checkpoint, copied, dirs_exist_ok=True)

    def export() -> None:
        export_model(checkpoint, folder / "exported", options)

    def remove() -> None:
        for name in ("copied", "exported"):
            shutil.rmtree(folder / name, ignore_errors=True)

    num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    arms = {"copy of the files": copy, "remove": remove, "export": export, "remove again": remove}
    seconds = interleave(arms, repeats, pause_seconds=_PAUSE_SECONDS)
    rate = {name: [num_bytes / _MEBIBYTE / one for one in seconds[name]] for name in ("copy of the files", "export")}
    rows: list[Row] = [
        {"benchmark": "export speed", "arm": name, **spread(rate[name], "mib_per_second")} for name in rate
    ]
    base = rows[0]["mib_per_second"]
    return [{**row, "ratio": row["mib_per_second"] / base, "repeats": repeats} for row in rows]


def _memory_row(framework_bytes: int, peak_bytes: int, shard_bytes: int) -> Row:
    """Return the row on memory; `framework_bytes` is the peak of exporting a tiny model, almost all of it imports."""
    return {
        "benchmark": "export memory",
        "framework_mib": framework_bytes / _MEBIBYTE,
        "peak_mib": peak_bytes / _MEBIBYTE,
        "largest_shard_mib": shard_bytes / _MEBIBYTE,
        "ratio": (peak_bytes - framework_bytes) / shard_bytes,
    }

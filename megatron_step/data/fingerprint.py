"""A fingerprint of everything that the order and the content of a run's samples depend on; checkpoints keep it."""

import hashlib
from pathlib import Path
from typing import Any

from megatron_step.config.data import DataConfig
from megatron_step.data.check import check_files
from megatron_step.data.indexed_format import corpus_paths
from megatron_step.data.tokenizer import Tokenizer

_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 64


def data_fingerprint(config: DataConfig, tokenizer: Tokenizer, seq_length: int, num_samples: int) -> dict[str, Any]:
    """Return the fingerprint as JSON values: corpora, shares, seed, `seq_length`, number of samples, tokenizer.

    The fingerprint does not depend on the folder of a corpus. It holds each file's size and a hash of 64 blocks of
    64 KiB, spread from the first byte to the last; files of up to 4 MiB are hashed whole.

    Raises FileNotFoundError if a file is missing, and ValueError if it is empty.
    """
    return {
        "train": _blend_fingerprint(config.train),
        "validation": _blend_fingerprint(config.validation or []),
        "split": None if config.split is None else [round(share / sum(config.split), 12) for share in config.split],
        "seed": config.seed,
        "seq_length": seq_length,
        "num_samples": num_samples,
        "tokenizer": tokenizer.fingerprint,
    }


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError, with each difference, unless a checkpoint and this run have the same data."""
    differences = _differences("data", saved, current)
    if differences:
        raise ValueError(
            "the data differs from the data that the checkpoint was trained on: "
            + "; ".join(differences)
            + ". Restore the old data to resume exactly, or start a new run in another output_dir"
        )


def _blend_fingerprint(blend: list[tuple[float, str]]) -> list[dict[str, Any]]:
    total = sum(weight for weight, _ in blend)
    for _, prefix in blend:
        check_files(corpus_paths(prefix))
    return [
        {
            "name": Path(prefix).name,
            "weight": round(weight / total, 12),
            "bin": _file_fingerprint(corpus_paths(prefix).bin),
            "idx": _file_fingerprint(corpus_paths(prefix).idx),
        }
        for weight, prefix in blend
    ]


def _file_fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _BLOCK_BYTES * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for block in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return {"bytes": size, "hash": digest.hexdigest()}


def _differences(name: str, saved: Any, current: Any) -> list[str]:
    """Return a line such as `data.seed: 1 -> 2` for each value that differs."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = list(dict.fromkeys((*saved, *current)))
        return [line for key in keys for line in _differences(f"{name}.{key}", saved.get(key), current.get(key))]
    if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        pairs = enumerate(zip(saved, current, strict=True))
        return [line for index, (old, new) in pairs for line in _differences(f"{name}[{index}]", old, new)]
    return [] if saved == current else [f"{name}: {_short(saved)} -> {_short(current)}"]


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} corpora ({', '.join(str(corpus.get('name')) for corpus in value)})"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)

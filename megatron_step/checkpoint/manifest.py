"""The manifest of a checkpoint, which describes it, and the check that its files are whole."""

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_step.config.counts import counted
from megatron_step.config.load import config_from_text
from megatron_step.config.run import RunConfig
from megatron_step.config.yaml_json import read_json
from megatron_step.plan.states import Recipe, training_recipe

_FILE = "manifest.json"
_FORMAT = 2
_BLOCK_BYTES = 1 << 20  # fits the processor's cache between reading and the checksum


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete, or its files differ from the written ones."""


@dataclass(frozen=True)
class Manifest:
    """manifest.json of a checkpoint. It is written last, so a checkpoint without it is incomplete."""

    step: int
    """Finished optimizer steps."""
    stage_index: int
    """Index of the stage that the steps have reached; after the last step of a stage, still that stage."""
    consumed_samples: int
    """Training samples that the steps consumed."""
    vocab_size: int
    """Number of tokens in the model's vocabulary."""
    config: dict[str, Any]
    """Every key of the run's config."""
    plan: dict[str, Any]
    """The run's stages: layers, their sources, steps."""
    data_fingerprint: dict[str, Any]
    """Fingerprint of the training data: its content and order."""
    layout: dict[str, int]
    """The parallel layout that wrote the checkpoint, for information: any layout can load it."""
    files: dict[str, tuple[int, int]]
    """Bytes and CRC-32 of every other file of the checkpoint."""
    kept_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the imported Hugging Face model besides its shape (huggingface/kept_settings.py); may be empty."""

    def write(self, folder: Path) -> None:
        """Write the manifest into a checkpoint's folder and wait until it is on disk."""
        with open(folder / _FILE, "w", encoding="utf-8") as stream:
            json.dump({"format": _FORMAT, **asdict(self)}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in `folder`.

    Raises DamagedCheckpointError if there is no manifest, or if it cannot be read.
    """
    path = folder / _FILE
    try:
        values = read_json(path)
        if values.pop("format") != _FORMAT:
            raise DamagedCheckpointError(
                f"{path} has a format that this version cannot read: use a newer version of megatron_step"
            )
        values["files"] = {name: (int(size), int(crc)) for name, (size, crc) in values["files"].items()}
        return Manifest(**values)
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"{folder} is not a complete checkpoint: it has no {_FILE}. Use another checkpoint"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from None


def saved_config(manifest: Manifest) -> RunConfig:
    """Return the config of the run that wrote a checkpoint.

    Raises ValueError if this version does not know one of the config's keys.
    """
    return config_from_text(yaml.safe_dump(manifest.config))


def saved_recipe(manifest: Manifest) -> Recipe:
    """The recipe of the optimizer states in a checkpoint; raises as `saved_config` does."""
    return training_recipe(saved_config(manifest))


def file_table(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the bytes and the CRC-32 of the named files of a folder."""
    return {name: ((folder / name).stat().st_size, _crc32(folder / name)) for name in names}


def content_files(folder: Path) -> list[str]:
    """Return the sorted names of a checkpoint's files, without the manifest."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != _FILE)


def damage(folder: Path, files: dict[str, tuple[int, int]], names: Iterable[str]) -> str | None:
    """Describe the first problem of the named files of a checkpoint; None if they are whole."""
    for name in names:
        path = folder / name
        size, crc = files[name]
        try:
            actual = path.stat().st_size
            if actual != size:
                return f"{path} has {counted(actual, 'byte')} instead of {size:,}"
            if _crc32(path) != crc:
                return f"{path} is corrupt: its checksum does not match"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def _crc32(path: Path) -> int:
    crc = 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            crc = zlib.crc32(block[:count], crc)
    return crc

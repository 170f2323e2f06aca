"""Export a checkpoint as a Hugging Face model, in one process, with memory for little more than one layer.

OUT/            config.json  generation_config.json  model*.safetensors  tokenizer*  README.md
With `adapter_only`:
OUT/base/       these files, except README.md, of the model without its adapters
OUT/adapter/    the adapters for peft
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_step.checkpoint.load import FoundCheckpoint, find_at, is_finite
from megatron_step.checkpoint.manifest import saved_config
from megatron_step.config.model import ModelConfig
from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import RunConfig
from megatron_step.data.tokenizer import Tokenizer, fitting_tokenizer
from megatron_step.engine.host_memory import keep_freed_memory
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.growth.weights import saved_stage
from megatron_step.huggingface.architectures import hf_config
from megatron_step.huggingface.comparison import Comparison, compare, wrong_setting
from megatron_step.huggingface.hf_mapping import MappedWeight, hf_mapping
from megatron_step.huggingface.kept_settings import GENERATION_FILE, generation_config, kept_context, with_kept_config
from megatron_step.huggingface.model_card import DescribedModel, Metrics, model_card
from megatron_step.huggingface.new_folder import check_new, new_folder
from megatron_step.huggingface.peft_adapter import write_adapter
from megatron_step.huggingface.safetensors_files import plan_shards, weight_bytes, write_shards
from megatron_step.huggingface.saved_weights import SavedWeights
from megatron_step.huggingface.tokenizer_files import write_tokenizer
from megatron_step.huggingface.written_tensors import wrong_tensor

_SPARE_BYTES = 64 << 20  # disk space for the tokenizer and other small files


class DifferentModelError(RuntimeError):
    """Error for an exported model that differs from the trained one."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export."""

    dtype: str | None = None
    """Number format of the weights: float32, bfloat16 or float16; None for the checkpoint's."""
    max_shard_bytes: int = 5_000_000_000
    """Largest size of a .safetensors file in bytes; a single larger weight still fills one file."""
    adapter_only: bool = False
    """Whether the adapters are written apart, for peft, beside the model without adapters."""
    check: bool = False
    """Whether the export is compared with the trained model: tensors, config and logits."""
    tokenizer: str | None = None
    """Path of the tokenizer; None for the path that the run used."""


def export_model(
    checkpoint: Path,
    out: Path,
    options: ExportOptions,
    metrics: Metrics = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison | None:
    """Write the model of a checkpoint, or of a run's newest checkpoint, into the new folder `out`.

    `metrics` are the lines of the run's metrics.jsonl, for the model card. `progress` is called with the bytes written
    so far and the total bytes. `say` gets a line for each setting of an imported model that training changed.

    Returns the comparison of logits if `options.check` is set, else None. Raises ValueError, FileNotFoundError or
    FileExistsError for bad input, and DifferentModelError if the comparison fails. After an error `out` does not exist.
    """
    check_new(out)
    if options.check and options.adapter_only and find_spec("peft") is None:
        raise ValueError("the check of an adapter needs peft, which is not installed: run pip install peft")
    try:
        with keep_freed_memory(), parallel_layout(ParallelConfig(), seed=1, alone=True) as parallel:
            export = _prepare(find_at(checkpoint, parallel), options)
            for change in export.changes:
                say(change)
            with new_folder(out, export.num_bytes + _SPARE_BYTES) as folder:
                export.write(folder, out, metrics, progress)
                if not options.check:
                    return None
                return export.check(folder, parallel)
    finally:
        stop_world()


@dataclass(frozen=True)
class _Export:
    """A checkpoint that can be exported, with everything that is known before weights are read."""

    found: FoundCheckpoint
    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    weights: list[MappedWeight]
    saved: SavedWeights
    architecture: dict[str, Any]
    changes: list[str]
    options: ExportOptions

    @property
    def dtype(self) -> str:
        return str(self.architecture["torch_dtype"])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        return sum(weight_bytes(weight, self.torch_dtype.itemsize) for weight in self.weights)

    def write(self, folder: Path, out: Path, metrics: Metrics, progress: Callable[[int, int], None]) -> None:
        """Write all files into `folder`, which will be renamed to `out`."""
        model = folder / "base" if self.options.adapter_only else folder
        model.mkdir(exist_ok=True)
        _write_json(model / "config.json", self.architecture)
        write_tokenizer(self.tokenizer, self.model.context_length, model)  # before the weights, because it may fail
        done = 0

        def read(layer: Sequence[MappedWeight]) -> dict[str, Tensor]:
            nonlocal done
            done += sum(weight_bytes(weight, self.torch_dtype.itemsize) for weight in layer)
            progress(done, self.num_bytes)
            return self._tensors(layer)

        shards = plan_shards(self.weights, self.torch_dtype.itemsize, self.options.max_shard_bytes)
        write_shards(model, shards, self.torch_dtype, read)
        kept = self.found.manifest.kept_settings
        _write_json(model / GENERATION_FILE, generation_config(self.architecture, kept))
        for name, text in kept.get("files", {}).items():
            (model / Path(name).name).write_text(text, encoding="utf-8")
        if self.options.adapter_only:
            (folder / "adapter").mkdir()
            adapted = [weight for weight in self.weights if weight.key in self.saved.adapted]
            base = str(out / "base")
            write_adapter(folder / "adapter", adapted, self.config.adapter, base, self.torch_dtype, self.saved.read)
        num_weights = self.num_bytes // self.torch_dtype.itemsize
        described = DescribedModel(out.name, self.architecture, num_weights, self.tokenizer.eod_id, self.changes)
        card = model_card(described, self.found.manifest, metrics, self.options.adapter_only)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def check(self, folder: Path, parallel: Parallel) -> Comparison:
        """Compare the export in `folder` with the checkpoint.

        Raises DifferentModelError if they differ.
        """
        apart, manifest = self.options.adapter_only, self.found.manifest
        model, adapter = (folder / "base", folder / "adapter") if apart else (folder, None)
        scaling = self.config.adapter.alpha / self.config.adapter.rank if self.saved.adapted else 0.0
        problem = wrong_setting(model, self.model, manifest.vocab_size) or wrong_tensor(
            model, adapter, self.weights, self.saved, scaling, self.torch_dtype
        )
        if problem is not None:
            raise DifferentModelError(f"the exported model differs from the trained one: {problem}")
        result = compare(
            self.found, self.saved, model, adapter, self.torch_dtype, self.config.model.seq_length, parallel
        )
        if not result.is_within_rounding:
            raise DifferentModelError(f"the exported model differs from the trained one: {result}")
        return result

    def _tensors(self, weights: Sequence[MappedWeight]) -> dict[str, Tensor]:
        """Return the Hugging Face tensors of several weights; adapters are merged in fp32, and the sum rounded once."""
        read = self.saved.read if self.options.adapter_only else self.saved.read_merged
        whole = read([weight.key for weight in weights])
        tensors: dict[str, Tensor] = {}
        for weight in weights:
            rounded = whole.pop(weight.key).to(self.torch_dtype)
            if self.torch_dtype is torch.float16 and not is_finite(rounded):
                raise ValueError(f"{weight.key} has values too large for float16: choose --dtype bfloat16 or float32")
            tensors |= weight.split(rounded)
        return tensors


def _prepare(found: FoundCheckpoint, options: ExportOptions) -> _Export:
    """Collect everything that an export needs.

    Raises ValueError or FileNotFoundError if the checkpoint cannot be exported with `options`.
    """
    manifest, config = found.manifest, saved_config(found.manifest)
    model = replace(config.model, num_layers=saved_stage(manifest).num_layers)
    if model.max_position_embeddings is None:
        context = max(model.seq_length, kept_context(manifest.kept_settings))
        model = replace(model, max_position_embeddings=context)
    tokenizer = fitting_tokenizer(
        options.tokenizer or config.data.tokenizer,
        manifest.vocab_size,
        manifest.data_fingerprint.get("tokenizer"),
        config.data.tokenizer,
        config.data.end_of_document,
    )
    saved = SavedWeights(found)
    if options.adapter_only and not saved.adapted:
        raise ValueError(f"{found.path} has no adapters: export it without --adapter-only")
    dtype = options.dtype or ("float32" if config.training.precision == "fp32" else "bfloat16")
    computed = hf_config(model, manifest.vocab_size, dtype, tokenizer.bos_id, tokenizer.eod_id)
    architecture, changes = with_kept_config(computed, manifest.kept_settings)
    weights = hf_mapping(model, manifest.vocab_size)
    return _Export(found, config, model, tokenizer, weights, saved, architecture, changes, options)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

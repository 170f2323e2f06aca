"""Imports a Hugging Face model as a checkpoint to start a run from (`stages.start_from`), a tensor at a time.

OUT/checkpoints/step_00000000/    its weights: in bf16 if it has all of them in bf16, else in fp32, which holds each
                                  number of fp16, bf16 and fp32 as it is
OUT/tokenizer/                    its tokenizer
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from megatron_step.checkpoint.load import is_finite
from megatron_step.checkpoint.streamed import write_streamed
from megatron_step.config.data import DataConfig
from megatron_step.config.model import ModelConfig
from megatron_step.config.optimization import OptimizerConfig
from megatron_step.config.run import EvaluationConfig, RunConfig, TrainingConfig
from megatron_step.config.stages import StagesConfig
from megatron_step.data.tokenizer import end_of_document_line, fitting_tokenizer, load_tokenizer
from megatron_step.huggingface.architectures import hf_config
from megatron_step.huggingface.hf_folder import HFFolder, open_folder
from megatron_step.huggingface.kept_settings import kept_settings
from megatron_step.huggingface.new_folder import check_new, new_folder
from megatron_step.huggingface.safetensors_files import weight_bytes
from megatron_step.huggingface.tokenizer_files import check_exportable, copy_tokenizer
from megatron_step.planner.plan import make_plan

_SPARE_BYTES = 64 << 20  # room for tokenizer and other small files


@dataclass(frozen=True)
class Imported:
    """What a model has become."""

    model: ModelConfig
    """Its sizes and switches."""
    dtypes: list[str]
    """The number formats that its weights had, by torch's names."""
    notes: list[str]
    """What is not as the model's files say."""
    end_of_document: str
    """Which token ends documents."""

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """The number format that its weights are kept in."""
        return "bf16" if self.dtypes == ["bfloat16"] else "fp32"

    def config_sections(self, out: Path) -> str:
        """What a run's config needs to start from it in the folder `out`, as YAML; the rest of `model` is default."""
        values = asdict(self.model)
        model = {
            field.name: values[field.name]
            for field in fields(self.model)
            if getattr(self.model, field.name) != _default(field)
        }
        data, stages = {"tokenizer": str(out / "tokenizer")}, {"start_from": str(out)}
        return yaml.safe_dump({"model": model, "data": data, "stages": stages}, sort_keys=False, width=120)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def import_model(
    source: Path,
    out: Path,
    seq_length: int | None = None,
    tokenizer: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Write the model in the folder `source` as a checkpoint into the new folder `out`.

    `seq_length` are the tokens of a training sample, None for as many as the model is made for; `tokenizer` is where
    its tokenizer is, None for the same folder. `progress` gets the bytes written and those to write.

    Raises ValueError, FileNotFoundError or FileExistsError for input that cannot be used; nothing is left at `out`.
    """
    check_new(out)
    opened = open_folder(source, seq_length)
    model, weights = opened.model, opened.weights
    assert model.vocab_size is not None
    found_tokenizer = fitting_tokenizer(tokenizer or str(source), model.vocab_size, None)
    imported = Imported(model, opened.dtypes, opened.notes, end_of_document_line(found_tokenizer))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[imported.precision]
    kept = kept_settings(source)
    num_bytes = sum(weight_bytes(weight, dtype.itemsize) for weight in weights)
    with new_folder(out, num_bytes + _SPARE_BYTES) as folder:
        copy_tokenizer(found_tokenizer, folder / "tokenizer")
        copied = load_tokenizer(folder / "tokenizer")
        check_exportable(copied, hf_config(model, model.vocab_size, "float32", copied.bos_id, copied.eod_id))
        write_streamed(
            folder / "checkpoints",
            {weight.key: (weight.shape, dtype) for weight in weights},
            _reader(opened, dtype, progress),
            {**_description(imported, out, copied.fingerprint), "kept_settings": kept},
        )
    return imported


def _reader(opened: HFFolder, dtype: torch.dtype, progress: Callable[[int, int], None]) -> Callable[[str], Tensor]:
    """The weight of a key, made of its tensors."""
    by_key = {weight.key: weight for weight in opened.weights}
    num_bytes = {key: weight_bytes(weight, dtype.itemsize) for key, weight in by_key.items()}
    done = 0

    def read(key: str) -> Tensor:
        nonlocal done
        whole = by_key[key].join(opened.tensors).to(dtype)
        if not is_finite(whole):
            raise ValueError(f"{opened.path} holds values of {', '.join(by_key[key].names)} that are not finite")
        done += num_bytes[key]
        progress(done, sum(num_bytes.values()))
        return whole

    return read


def _description(imported: Imported, out: Path, tokenizer_fingerprint: str) -> dict[str, Any]:
    """What the checkpoint's manifest says: a run of no step, whose text nobody here knows."""
    config = RunConfig(
        output_dir=str(out),
        model=imported.model,
        data=DataConfig(train=[(1.0, "unknown")], tokenizer=str(out / "tokenizer")),
        stages=StagesConfig(steps=1),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        training=TrainingConfig(global_batch_size=1, micro_batch_size=1, precision=imported.precision),
        evaluation=EvaluationConfig(steps=0),
    )
    return {
        "stage_index": 0,
        "consumed_samples": 0,
        "vocab_size": imported.model.vocab_size,
        "config": asdict(config),
        "plan": make_plan(config, imported.model.vocab_size or 0).to_dict(),
        "data_fingerprint": {"tokenizer": tokenizer_fingerprint},
        "layout": {},
    }

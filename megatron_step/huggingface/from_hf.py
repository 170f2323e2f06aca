"""Import a Hugging Face model as a checkpoint to start a run from (`stages.start_from`), one tensor at a time.

OUT/checkpoints/step_00000000/    the weights: in bf16 if all of them are in bf16, else in fp32, which holds fp16, bf16
                                  and fp32 numbers exactly
OUT/tokenizer/                    the tokenizer
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
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan

_SPARE_BYTES = 64 << 20  # disk space for the tokenizer and other small files


@dataclass(frozen=True)
class Imported:
    """A summary of an imported model."""

    model: ModelConfig
    """The model's sizes and switches."""
    dtypes: list[str]
    """Number formats of the weights in the files, by torch's names."""
    notes: list[str]
    """Warnings about differences from the model's files."""
    end_of_document: str
    """Report line about the token that ends documents."""

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """The number format of the checkpoint's weights."""
        return "bf16" if self.dtypes == ["bfloat16"] else "fp32"

    def config_sections(self, out: Path) -> str:
        """Return the config sections of a run that starts from the checkpoint in `out`, as YAML without defaults."""
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

    `seq_length` is the number of tokens in a training sample; None takes the model's context length. `tokenizer` is the
    tokenizer's path; None takes `source`. `progress` is called with the bytes written so far and the total bytes.

    Raises ValueError, FileNotFoundError or FileExistsError for bad input. After an error `out` does not exist.
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
    """Return a function from a key to its weight, joined from Hugging Face tensors and converted to `dtype`."""
    by_key = {weight.key: weight for weight in opened.weights}
    num_bytes = {key: weight_bytes(weight, dtype.itemsize) for key, weight in by_key.items()}
    done = 0

    def read(key: str) -> Tensor:
        nonlocal done
        whole = by_key[key].join(opened.tensors).to(dtype)
        if not is_finite(whole):
            names = ", ".join(by_key[key].names)
            raise ValueError(f"{opened.path} has infinite or NaN values in {names}: get an undamaged copy of the model")
        done += num_bytes[key]
        progress(done, sum(num_bytes.values()))
        return whole

    return read


def _description(imported: Imported, out: Path, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Return the checkpoint's manifest fields: a run at step 0 whose training data is unknown."""
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
        "plan": make_plan(resolve(config, imported.model.vocab_size or 0)).to_dict(),
        "data_fingerprint": {"tokenizer": tokenizer_fingerprint},
        "layout": {},
    }

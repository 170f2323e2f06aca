"""The model in a Hugging Face folder: its config.json and its tensors, which must agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_step.config.counts import counted
from megatron_step.config.model import ModelConfig
from megatron_step.huggingface.architectures import model_config
from megatron_step.huggingface.hf_mapping import HF_EMBEDDING, HF_OUTPUT_LAYER, MappedWeight, hf_mapping
from megatron_step.huggingface.safetensors_files import HFTensors

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The supported number formats: torch's names by safetensors' names."""

_COMPARED_BYTES = 64 << 20  # size of the blocks in which two matrices are compared


@dataclass(frozen=True)
class HFFolder:
    """A Hugging Face model in a folder."""

    path: Path
    """The folder."""
    model: ModelConfig
    """The model of config.json; untied if the files hold a different output layer."""
    tensors: Mapping[str, Tensor]
    """The tensors by name; each is read when it is used."""
    weights: list[MappedWeight]
    """The checkpoint's weights and the tensors of each."""
    dtypes: list[str]
    """Number formats of the tensors, by torch's names, sorted."""
    notes: list[str]
    """Warnings about tensors that contradict config.json."""


def open_folder(folder: Path, seq_length: int | None) -> HFFolder:
    """Open the model in `folder` for samples of `seq_length` tokens; None takes the model's context length.

    Raises ValueError or OSError if the model is not supported or damaged, or if the folder holds tensors or settings
    that are unknown.
    """
    model = model_config(folder, seq_length)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has an adapter (adapter_config.json), which transformers would add to the model: merge the "
            "adapter with peft (merge_and_unload), or move its files elsewhere"
        )
    tensors = HFTensors(folder)
    if model.num_layers > len(tensors):
        raise ValueError(
            f"{folder} has {counted(len(tensors), 'tensor')}, but its config.json has num_hidden_layers "
            f"{model.num_layers:,}: get an undamaged copy of the model"
        )
    model, names, notes = _tied(folder, model, tensors)
    assert model.vocab_size is not None
    weights = [
        replace(weight, names=tuple(names.get(name, name) for name in weight.names))
        for weight in hf_mapping(model, model.vocab_size)
    ]
    _check_tensors(folder, tensors, weights, {*names})
    dtypes = sorted({DTYPES[tensors.dtypes[name]] for weight in weights for name in weight.names})
    return HFFolder(folder, model, tensors, weights, dtypes, notes)


def _tied(folder: Path, model: ModelConfig, tensors: HFTensors) -> tuple[ModelConfig, dict[str, str], list[str]]:
    """Return the model, tied or not as transformers loads it; replacements of tensor names; and warnings."""
    if not model.tie_embeddings or HF_OUTPUT_LAYER not in tensors.shapes:
        return model, {}, []
    if HF_EMBEDDING not in tensors.shapes:
        return model, {HF_EMBEDDING: HF_OUTPUT_LAYER}, []
    if _are_equal(tensors, HF_EMBEDDING, HF_OUTPUT_LAYER):
        return model, {HF_OUTPUT_LAYER: HF_EMBEDDING}, []
    note = (
        f"{folder / 'config.json'} has tie_word_embeddings true, but {HF_OUTPUT_LAYER} differs from {HF_EMBEDDING}: "
        "the output layer keeps its own weight (model.tie_embeddings false), as in transformers"
    )
    return replace(model, tie_embeddings=False), {}, [note]


def _are_equal(tensors: HFTensors, one: str, other: str) -> bool:
    """Return whether two matrices have equal values; only a few rows are in memory at a time."""
    if tensors.shapes[one] != tensors.shapes[other]:
        return False
    rows, columns = (*tensors.shapes[one], 1)[:2]
    step = max(1, _COMPARED_BYTES // (8 * max(columns, 1)))
    return all(
        bool((tensors.rows(one, first, first + step).float() == tensors.rows(other, first, first + step).float()).all())
        for first in range(0, rows, step)
    )


def _check_tensors(folder: Path, tensors: HFTensors, weights: Sequence[MappedWeight], spare: set[str]) -> None:
    """Raise ValueError unless the folder has exactly the tensors, in the shapes, that config.json needs."""
    needed = {name: shape for weight in weights for name, shape in weight.hf_shapes.items()}
    for name, shape in needed.items():
        if name not in tensors.shapes:
            raise ValueError(f"{folder} lacks the tensor {name}, which its config.json needs: get a complete copy")
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{folder} has {name} in shape {list(tensors.shapes[name])}, but its config.json needs {list(shape)}: "
                "correct config.json, or get an undamaged copy of the model"
            )
        if tensors.dtypes[name] not in DTYPES:
            raise ValueError(
                f"{folder} has {name} in {tensors.dtypes[name]}, which is not supported: save the model in one of "
                f"{', '.join(DTYPES)}"
            )
    # Old files hold inverse frequencies, which the config defines.
    more = [name for name in tensors.shapes if name not in needed and not name.endswith(".rotary_emb.inv_freq")]
    unknown = [name for name in more if name not in spare]
    if unknown:
        raise ValueError(
            f"{folder} has tensors that its config.json does not describe: {', '.join(unknown[:4])}. Correct "
            "config.json, or remove the tensors"
        )

"""The model in a Hugging Face folder: its config.json and tensors, which must explain each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_step.config.model import ModelConfig
from megatron_step.huggingface.architectures import model_config
from megatron_step.huggingface.hf_mapping import MappedWeight, hf_mapping
from megatron_step.huggingface.safetensors_files import HFTensors

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The number formats that are read, as safetensors and as torch call them."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_BYTES = 64 << 20  # of an embedding, at once


@dataclass(frozen=True)
class HFFolder:
    """A model that transformers loads from a folder."""

    path: Path
    """The folder."""
    model: ModelConfig
    """What it computes: as its config.json says, but untied where the files hold another output layer."""
    tensors: Mapping[str, Tensor]
    """Its tensors by name, each read when it is asked for."""
    weights: list[MappedWeight]
    """What our weights are made of."""
    dtypes: list[str]
    """Number formats of the tensors, by torch's names, sorted."""
    notes: list[str]
    """What a reader of config.json alone would not expect."""


def open_folder(folder: Path, seq_length: int | None) -> HFFolder:
    """The model in `folder`, for samples of `seq_length` tokens, None for as many as it is made for.

    Raises ValueError or OSError if it is not supported, damaged, or holds what would change the model and is not
    understood.
    """
    model = model_config(folder, seq_length)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has an adapter (adapter_config.json), which transformers adds to the model: merge it with peft "
            "(merge_and_unload), or move it elsewhere"
        )
    tensors = HFTensors(folder)
    if model.num_layers > len(tensors):
        raise ValueError(
            f"{folder} has {len(tensors):,} tensors, but its config.json says num_hidden_layers {model.num_layers:,}"
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
    """The model, tied or not as transformers loads it; which tensor stands for another; and what is to be said."""
    if not model.tie_embeddings or _HEAD not in tensors.shapes:
        return model, {}, []
    if _EMBEDDING not in tensors.shapes:
        return model, {_EMBEDDING: _HEAD}, []
    if _are_equal(tensors, _EMBEDDING, _HEAD):
        return model, {_HEAD: _EMBEDDING}, []
    note = (
        f"{folder / 'config.json'} says tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}: the two stay apart "
        "(model.tie_embeddings false), as in transformers"
    )
    return replace(model, tie_embeddings=False), {}, [note]


def _are_equal(tensors: HFTensors, one: str, other: str) -> bool:
    """Whether two matrices have the same values, read a few rows at a time."""
    if tensors.shapes[one] != tensors.shapes[other]:
        return False
    rows, columns = (*tensors.shapes[one], 1)[:2]
    step = max(1, _COMPARED_BYTES // (8 * max(columns, 1)))
    return all(
        bool((tensors.rows(one, first, first + step).float() == tensors.rows(other, first, first + step).float()).all())
        for first in range(0, rows, step)
    )


def _check_tensors(folder: Path, tensors: HFTensors, weights: Sequence[MappedWeight], spare: set[str]) -> None:
    """Raise ValueError unless the model has exactly the tensors, in the shapes, that its config.json says."""
    needed = {name: shape for weight in weights for name, shape in weight.hf_shapes.items()}
    for name, shape in needed.items():
        if name not in tensors.shapes:
            raise ValueError(f"{folder} has no tensor {name}, which its config.json needs")
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{folder} has {name} in shape {list(tensors.shapes[name])}; its config.json needs {list(shape)}"
            )
        if tensors.dtypes[name] not in DTYPES:
            raise ValueError(f"{folder} has {name} in {tensors.dtypes[name]}: only {', '.join(DTYPES)} are supported")
    # Old files hold what follows from the config.
    more = [name for name in tensors.shapes if name not in needed and not name.endswith(".rotary_emb.inv_freq")]
    unknown = [name for name in more if name not in spare]
    if unknown:
        raise ValueError(f"{folder} has tensors that its config.json does not explain: {', '.join(unknown[:4])}")

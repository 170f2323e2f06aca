"""A Hugging Face model's tensors in one .safetensors file, or in shards with an index: writing and reading."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_step.export.hf_mapping import MappedWeight
from megatron_step.export.new_folder import finish_file

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def plan_shards(weights: Sequence[MappedWeight], element_bytes: int, max_bytes: int) -> list[list[MappedWeight]]:
    """The weights, in order, in shards of at most `max_bytes`; a weight is not cut, however large it is."""
    shards: list[list[MappedWeight]] = [[]]
    used = 0
    for weight in weights:
        size = weight_bytes(weight, element_bytes)
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(weight)
        used += size
    return shards


def weight_bytes(weight: MappedWeight, element_bytes: int) -> int:
    """Bytes of the tensors that a weight is made of."""
    return sum(prod(shape) for shape in weight.hf_shapes.values()) * element_bytes


def write_shards(
    folder: Path, shards: Sequence[Sequence[MappedWeight]], read: Callable[[Sequence[MappedWeight]], dict[str, Tensor]]
) -> None:
    """Write one shard after another, with the tensors that `read` gives of its weights, and the index of several."""
    places: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = read(shard)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        finish_file(folder / name)
        places |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard comes
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class HFTensors(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model's folder by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if a file is missing, truncated, or has not the tensors that the index says it has."""
        self._places: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Lengths of each tensor."""
        self.dtypes: dict[str, str] = {}
        """Number format of each, as safetensors call it: F32, BF16, F16."""
        for name, expected in _files(folder).items():
            file = _open(folder / name)
            held = set(file.keys())
            for tensor in held if expected is None else expected:
                if tensor not in held:
                    raise ValueError(f"{folder / name} has no tensor {tensor}, which {_INDEX} says it has")
                view = file.get_slice(tensor)
                self._places[tensor] = file
                self.shapes[tensor], self.dtypes[tensor] = tuple(view.get_shape()), view.get_dtype()

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _files(folder: Path) -> Mapping[str, Sequence[str] | None]:
    """Names of a model's files, and of the tensors that each is to have; None where no index says."""
    if not (folder / _INDEX).is_file():
        if not (folder / _SINGLE).is_file():
            raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}: only safetensors are supported")
        return {_SINGLE: None}
    try:
        places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: [tensor for tensor in places if places[tensor] == name] for name in sorted(set(places.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / _INDEX} is not an index of shards: {error}") from None


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"the shard {path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None

"""Write and read a Hugging Face model's tensors in one .safetensors file, or in shards with an index."""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_step.config.yaml_json import read_json
from megatron_step.engine.files import is_git_lfs_pointer
from megatron_step.huggingface.hf_mapping import MappedWeight
from megatron_step.plan.names import layer_of

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf")
_BLOCK_BYTES = 1 << 18  # size of one write; Linux is slower with larger ones, since it allocates larger pages for them
_FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def plan_shards(weights: Sequence[MappedWeight], element_bytes: int, max_bytes: int) -> list[list[MappedWeight]]:
    """Group the weights, in order, into shards of at most `max_bytes`; a single weight is never split."""
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
    """Bytes of a weight's Hugging Face tensors."""
    return sum(prod(shape) for shape in weight.hf_shapes.values()) * element_bytes


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[MappedWeight]],
    dtype: torch.dtype,
    read: Callable[[Sequence[MappedWeight]], dict[str, Tensor]],
) -> None:
    """Write the shards, and their index if there are several.

    `read` returns the Hugging Face tensors, in `dtype`, of several weights of one layer.
    """
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {tensor: shape for weight in shard for tensor, shape in weight.hf_shapes.items()}
        layers = groupby(shard, key=lambda weight: layer_of(weight.key))
        write_safetensors(folder / name, shapes, dtype, (read(list(weights)) for _, weights in layers))
        places |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        total_bytes = sum(weight_bytes(weight, dtype.itemsize) for shard in shards for weight in shard)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, groups: Iterable[Mapping[str, Tensor]]
) -> None:
    """Write a .safetensors file from groups of tensors in one number format, in the order of `shapes`.

    A thread writes one group while the next one is made. The library's writer needs all tensors in memory and takes
    longer (`tools/benchmark.py export`). A file holds the header's length in 8 bytes, the header, and the tensors'
    bytes without gaps (https://github.com/huggingface/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _FORMATS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    names = iter(shapes)

    def write(group: Mapping[str, Tensor]) -> None:
        for name, tensor in group.items():
            assert (name, tuple(tensor.shape), tensor.dtype) == (next(names), tuple(shapes[name]), dtype)
            _write(file, tensor.flatten().view(torch.uint8).numpy().data)

    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as disk:
        file.write(len(text).to_bytes(8, "little") + text)
        written = None
        for group in groups:
            if written is not None:
                written.result()  # at most one group waits
            written = disk.submit(write, group)
        if written is not None:
            written.result()
    assert next(names, None) is None


def _write(file: io.RawIOBase, content: memoryview) -> None:
    """Append all of `content`, and ask the system to start writing it to disk, so that the final sync is short."""
    start = file.tell()
    for first in range(0, len(content), _BLOCK_BYTES):
        block = content[first : first + _BLOCK_BYTES]
        while block:
            block = block[file.write(block) :]
    if hasattr(os, "posix_fadvise"):  # missing on macOS; on Linux DONTNEED starts the write
        os.posix_fadvise(file.fileno(), start, len(content), os.POSIX_FADV_DONTNEED)


class HFTensors(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model's folder by name; each is read when it is used.

    Like transformers, this takes all tensors of the files that an index names, even those that the index leaves out.

    Raises FileNotFoundError if a file is missing. Raises ValueError if a file is truncated, if it lacks a tensor of the
    index, or if two files have the same tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each tensor."""
        self.dtypes: dict[str, str] = {}
        """Number format of each tensor by safetensors' names: F32, BF16, F16."""
        for name, expected in _files(folder).items():
            file = _open(folder / name)
            held = list(file.keys())
            missing = set(expected).difference(held)
            if missing:
                raise ValueError(
                    f"{folder / name} lacks the tensor {min(missing)} that {_INDEX} names: get a complete copy"
                )
            for tensor in held:
                if tensor in self._places:
                    raise ValueError(f"{folder} has {tensor} in {name} and in another file: remove one of the two")
                view = file.get_slice(tensor)
                self._places[tensor] = file
                self.shapes[tensor], self.dtypes[tensor] = tuple(view.get_shape()), view.get_dtype()

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Read the rows from `first` to `end` of a tensor."""
        return self._places[name].get_slice(name)[first:end]

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _files(folder: Path) -> Mapping[str, Sequence[str]]:
    """Names of a model's files, and the tensors that the index expects in each.

    Like transformers, this ignores the index if there is a single file.

    Raises FileNotFoundError if there is neither, and ValueError if the index is not valid.
    """
    if (folder / _SINGLE).is_file():
        return {_SINGLE: []}
    if not (folder / _INDEX).is_file():
        others = sorted(path.name for ending in _OTHER_WEIGHTS for path in folder.glob(ending))
        remedy = f"save {', '.join(others[:3])} as safetensors with transformers" if others else "give another folder"
        raise FileNotFoundError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, and only safetensors are supported: {remedy}"
        )
    try:
        places = read_json(folder / _INDEX)["weight_map"]
        names = sorted(set(places.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"its weight_map names files outside the folder, or none: {names}")
        return {name: [tensor for tensor in places if places[tensor] == name] for name in names}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / _INDEX} is not a valid index of shards: {error}") from None


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"the shard {path} is missing: get a complete copy of the model")
    if is_git_lfs_pointer(path):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): get an undamaged copy") from None

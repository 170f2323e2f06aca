"""A Hugging Face model's tensors in one .safetensors file, or in shards with an index: writing and reading."""

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

from megatron_step.huggingface.hf_mapping import MappedWeight
from megatron_step.plan.names import layer_of

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf")
_BLOCK_BYTES = 1 << 18  # of one write: for large ones Linux takes large pieces of its page cache, and longer
_FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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
    folder: Path,
    shards: Sequence[Sequence[MappedWeight]],
    dtype: torch.dtype,
    read: Callable[[Sequence[MappedWeight]], dict[str, Tensor]],
) -> None:
    """Write one shard after another, and the index of several.

    `read` gives the tensors, in `dtype`, that some weights of one layer are made of.
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
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, parts: Iterable[Mapping[str, Tensor]]
) -> None:
    """Write a .safetensors file of tensors of one number format, which come in parts, in the order of `shapes`.

    While a part is written the next one is made. The library's own writer needs all of them at once, and more time
    (`tools/benchmark.py export`). A file is the length of its header in 8 bytes, the header, and the tensors' bytes
    without gaps (https://github.com/huggingface/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _FORMATS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    names = iter(shapes)

    def write(part: Mapping[str, Tensor]) -> None:
        for name, tensor in part.items():
            assert (name, tuple(tensor.shape), tensor.dtype) == (next(names), tuple(shapes[name]), dtype)
            _write(file, tensor.flatten().view(torch.uint8).numpy().data)

    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as disk:
        file.write(len(text).to_bytes(8, "little") + text)
        written = None
        for part in parts:
            if written is not None:
                written.result()  # one part waits at most
            written = disk.submit(write, part)
        if written is not None:
            written.result()
    assert next(names, None) is None


def _write(file: io.RawIOBase, content: memoryview) -> None:
    """Append all of `content`, and have the system begin to bring it to disk, so that less is left to wait for."""
    start = file.tell()
    for first in range(0, len(content), _BLOCK_BYTES):
        block = content[first : first + _BLOCK_BYTES]
        while block:
            block = block[file.write(block) :]
    if hasattr(os, "posix_fadvise"):  # not on macOS; Linux begins to write what it may drop
        os.posix_fadvise(file.fileno(), start, len(content), os.POSIX_FADV_DONTNEED)


class HFTensors(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model's folder by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if a file is missing, truncated, or lacks a tensor that the index names."""
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

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Some rows of one of them."""
        return self._places[name].get_slice(name)[first:end]

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _files(folder: Path) -> Mapping[str, Sequence[str] | None]:
    """Names of a model's files, and of the tensors that each is to have; None where no index says.

    As transformers chooses: an index counts only where there is no single file.
    """
    if (folder / _SINGLE).is_file():
        return {_SINGLE: None}
    if not (folder / _INDEX).is_file():
        others = sorted(path.name for ending in _OTHER_WEIGHTS for path in folder.glob(ending))
        more = f"; it has {', '.join(others[:3])}: save the model again with transformers" if others else ""
        raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}: only safetensors are supported{more}")
    try:
        places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("weight_map must name files of the same folder")
        return {name: [tensor for tensor in places if places[tensor] == name] for name in names}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / _INDEX} is not an index of shards: {error}") from None


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"the shard {path} is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None

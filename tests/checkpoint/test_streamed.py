"""A checkpoint that is written a tensor at a time loads as any other."""

import weakref
from pathlib import Path

import pytest
import torch
from file_size_limit import file_size_limit
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from small_run import manifest_facts, read_checkpoint, small_config

from megatron_step.checkpoint.load import find_at, load_tensors
from megatron_step.checkpoint.streamed import write_streamed
from megatron_step.engine.parallel import Parallel

TENSORS = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(5).bfloat16()}
SHAPES = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in TENSORS.items()}


def test_it_is_whole_and_loads_in_parts(tmp_path: Path, alone: Parallel) -> None:
    read: list[str] = []

    def tensor(key: str) -> torch.Tensor:
        read.append(key)
        return TENSORS[key]

    path = write_streamed(tmp_path, SHAPES, tensor, manifest_facts(small_config()))
    assert sorted(read) == sorted(TENSORS), "each is asked for once"
    assert find_at(path, alone).manifest.step == 0
    loaded = read_checkpoint(path)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())
    part = ShardedTensor.from_rank_offsets("a.weight", torch.empty(3, 4), (0, 1, 2))
    assert torch.equal(load_tensors(path, {"part": part}, shared=True)["part"], TENSORS["a.weight"][3:])


def test_two_tensors_are_alive_at_most(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    def tensor(key: str) -> torch.Tensor:
        nonlocal most
        made = torch.zeros(100)
        alive.add(id(made.untyped_storage()))
        most = max(most, len(alive))
        weakref.finalize(made.untyped_storage(), alive.discard, id(made.untyped_storage()))
        return made

    shapes = {f"{index}.weight": ((100,), torch.float32) for index in range(12)}
    write_streamed(tmp_path, shapes, tensor, manifest_facts(small_config()))
    assert most == 2


def test_what_the_reader_raises_ends_it(tmp_path: Path) -> None:
    def fail(key: str) -> torch.Tensor:
        raise ValueError(f"no {key}")

    with pytest.raises(ValueError, match=r"^no a.weight$"):
        write_streamed(tmp_path, SHAPES, fail, {})


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """The limit cuts a tensor's file, and then the last file, which has no tensor."""
    for shapes, size in ((SHAPES, 700), ({}, 600)):
        with file_size_limit(size), pytest.raises(OSError, match=r"cannot write a checkpoint into .* MiB are free"):
            write_streamed(tmp_path / str(size), shapes, TENSORS.__getitem__, {})

"""Shards that the library reads, and damaged ones that are named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_step.huggingface.hf_mapping import MappedWeight
from megatron_step.huggingface.safetensors_files import HFTensors, plan_shards, write_safetensors, write_shards

_WEIGHTS = [
    MappedWeight(f"decoder.layers.{layer}.w", (6, 2), (f"a.{layer}", f"b.{layer}"), (2, 1)) for layer in range(4)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "one": torch.randn(3, 5).to(dtype),
        "two": torch.randn(7).to(dtype),
        "three": torch.zeros(2, 2).to(dtype),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    parts = ({name: tensors[name] for name in names} for names in (["one", "two"], ["three"]))
    write_safetensors(tmp_path / "x.safetensors", shapes, dtype, parts)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == dtype for name, tensor in tensors.items())


def test_shards_hold_as_much_as_they_may() -> None:
    # 48 bytes each
    assert [len(shard) for shard in plan_shards(_WEIGHTS, 4, 100)] == [2, 2]
    assert [len(shard) for shard in plan_shards(_WEIGHTS, 4, 95)] == [1, 1, 1, 1]
    assert [len(shard) for shard in plan_shards(_WEIGHTS, 4, 150)] == [3, 1]
    assert [len(shard) for shard in plan_shards(_WEIGHTS, 4, 1)] == [1, 1, 1, 1], "a weight is not cut"


def shards(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards of two weights each in `folder`, and their tensors."""
    whole = {weight.key: torch.randn(weight.shape) for weight in _WEIGHTS}
    write_shards(
        folder,
        plan_shards(_WEIGHTS, 4, 100),
        torch.float32,
        lambda weights: {name: part for one in weights for name, part in one.split(whole[one.key]).items()},
    )
    return {name: part for weight in _WEIGHTS for name, part in weight.split(whole[weight.key]).items()}


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    written = shards(tmp_path)
    read = HFTensors(tmp_path)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    assert read.shapes["a.0"] == (4, 2)
    assert set(read.dtypes.values()) == {"F32"}


def test_damage_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    save_file({"a.2": torch.zeros(4, 2)}, second)
    with pytest.raises(
        ValueError, match=r"00002.safetensors lacks the tensor .* that model.safetensors.index.json names"
    ):
        HFTensors(tmp_path)
    second.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="00002.safetensors is truncated or damaged"):
        HFTensors(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="the shard .*00002.safetensors is missing"):
        HFTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 1}))
    with pytest.raises(ValueError, match="is not a valid index of shards"):
        HFTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors are supported"):
        HFTensors(tmp_path)


def test_tensors_beside_those_of_the_index_count_as_in_transformers(tmp_path: Path) -> None:
    """transformers loads whole files, and takes a tensor that two files have from the last one."""
    shards(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    whole = load_file(path)
    save_file({**whole, "beside": torch.ones(2)}, path)
    assert torch.equal(HFTensors(tmp_path)["beside"], torch.ones(2))
    save_file({**whole, "a.0": torch.ones(4, 2)}, path)
    with pytest.raises(ValueError, match="has a.0 in model-00002-of-00002.safetensors and in another file"):
        HFTensors(tmp_path)


def test_a_file_that_git_did_not_fetch_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match="is a pointer of Git LFS"):
        HFTensors(tmp_path)

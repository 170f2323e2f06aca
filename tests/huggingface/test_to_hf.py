"""transformers computes from an export what the trained model does, whatever layout and stage was saved."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hf_checkpoints import LAYOUTS, MODELS, grown_config, hf_loss, save_stages, word_tokenizer
from long_suite import cases
from safetensors.torch import load_file
from small_run import read_checkpoint
from transformers import AutoTokenizer
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.huggingface import hf_mapping, to_hf
from megatron_step.huggingface.to_hf import DifferentModelError, ExportOptions, export_model

# What `make test` runs; tests of checkpoint/whole_tensors read the other layouts.
KEPT = [("llama", "TP2 PP2"), ("llama 3, tied", "one"), ("qwen2", "one"), ("qwen3, tied", "TP2 PP2")]


class Saved:
    """Checkpoints of every architecture in a layout, written together when the first is asked for."""

    def __init__(self, worlds: Worlds, folder: Path) -> None:
        self._worlds, self._folder = worlds, folder
        self._tokenizer = word_tokenizer(folder / "tokenizer")
        self._losses: dict[str, list[list[float]]] = {}

    def __call__(self, model: str, layout: str) -> tuple[RunConfig, Path, list[float]]:
        """Config, folder with the stages' checkpoints, and their losses."""
        folders = [self._folder / f"{layout} {name}" for name in MODELS]
        configs = [grown_config(name, layout, self._tokenizer) for name in MODELS]
        index = list(MODELS).index(model)
        if layout not in self._losses:
            merges = layout in ("one", "TP2 PP2")
            world = self._worlds(LAYOUTS[layout][0])
            self._losses[layout] = world.run(save_stages, configs=configs, folders=folders, merges=merges)[0]
        return configs[index], folders[index], self._losses[layout][index]


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(worlds, tmp_path_factory.mktemp("saved"))


def checkpoint_in(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize(("model", "layout"), cases(product(MODELS, LAYOUTS), KEPT))
def test_logits_and_loss_are_those_of_the_trained_model(saved: Saved, tmp_path: Path, model: str, layout: str) -> None:
    config, folder, losses = saved(model, layout)
    for name, loss in zip(("live", "merged"), losses):
        assert has_adapters_that_matter(checkpoint_in(folder / name)) == (name == "live")
        comparison = export_model(checkpoint_in(folder / name), tmp_path / name, ExportOptions(check=True))
        assert comparison is not None
        assert comparison.largest_logit > 1
        assert comparison.max_difference <= 1e-5 * comparison.largest_logit
        assert comparison.agreement == 1
        assert hf_loss(tmp_path / name, config) == pytest.approx(loss, rel=1e-5)


def has_adapters_that_matter(checkpoint: Path) -> bool:
    tensors = read_checkpoint(checkpoint)
    factors = [tensor for key, tensor in tensors.items() if key.endswith("linear_out.weight") and "state" not in key]
    assert factors
    return any(bool(tensor.any()) for tensor in factors)


def test_shards_hold_what_one_file_holds(saved: Saved, tmp_path: Path) -> None:
    _, folder, _ = saved("qwen2", "one")
    progress: list[tuple[int, int]] = []
    for name, most in (("whole", 10**9), ("shards", 200_000)):
        options = ExportOptions(max_shard_bytes=most)
        export_model(checkpoint_in(folder / "live"), tmp_path / name, options, progress=lambda *at: progress.append(at))
    whole = load_file(tmp_path / "whole/model.safetensors")
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values()) == progress[-1][0]
    assert progress[-1][0] == progress[-1][1]
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert together.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())
    assert all(file.stat().st_size < 220_000 for file in files)


def test_a_run_is_exported_with_its_tokenizer_and_how_it_was_trained(saved: Saved, tmp_path: Path) -> None:
    _, folder, _ = saved("llama", "one")
    run = tmp_path / "run"
    run.mkdir()
    os.symlink(folder / "live", run / "checkpoints")
    metrics = [
        {"step": step, "loss": 3.25, "validation_loss": 2.5, "memory": {"peak_bytes": 3 << 20}} for step in range(1, 7)
    ]
    export_model(run, tmp_path / "out", ExportOptions(dtype="bfloat16"), metrics)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a fine morning")["input_ids"] == [4, 5, 6]
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["architectures"], written["vocab_size"], written["torch_dtype"]) == (
        ["LlamaForCausalLM"],
        250,
        "bfloat16",
    )
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 1
    card = (tmp_path / "out/README.md").read_text()
    assert "| 2 | 2 + 1 new | 3 | 768 | 3.2500 | 2.5000 |" in card
    assert "3.0 MiB |" in card
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def test_what_cannot_be_exported_is_said_and_nothing_is_left(saved: Saved, tmp_path: Path) -> None:
    _, folder, _ = saved("llama", "one")
    checkpoint = checkpoint_in(folder / "live")
    other = word_tokenizer(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"fine"', '"bad"'))
    large = word_tokenizer(tmp_path / "large")
    (large / "tokenizer.json").write_text(text.replace('"fine": 5', '"fine": 5000').replace('"fine":5', '"fine":5000'))
    there = tmp_path / "there"
    there.mkdir()
    kept = sorted(tmp_path.iterdir())
    cases: list[tuple[Path, ExportOptions, Path, str]] = [
        (tmp_path / "nowhere", ExportOptions(), tmp_path / "out", "there is no checkpoint"),
        (checkpoint, ExportOptions(), there, "already exists"),
        (checkpoint, ExportOptions(tokenizer=str(other)), tmp_path / "out", "not the tokenizer"),
        (checkpoint, ExportOptions(tokenizer=str(large)), tmp_path / "out", "has 5,001 tokens"),
        (
            checkpoint,
            ExportOptions(tokenizer=str(tmp_path / "none")),
            tmp_path / "out",
            "does not exist: give a SentencePiece",
        ),
    ]
    for path, options, out, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            export_model(path, out, options)
        assert sorted(tmp_path.iterdir()) == kept


def swapped(split: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A planted fault: gate and up in each other's place."""

    def wrong(self: hf_mapping.MappedWeight, whole: torch.Tensor) -> dict[str, Any]:
        names: Sequence[str] = self.names[::-1] if len(self.names) == 2 else self.names
        return dict(zip(self.names, [split(self, whole)[name] for name in names]))

    return wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_notices_a_wrong_mapping(saved: Saved, tmp_path: Path, dtype: str) -> None:
    _, folder, _ = saved("llama", "one")
    weight = hf_mapping.MappedWeight
    with patch.object(weight, "split", swapped(weight.split)), pytest.raises(DifferentModelError, match="top-1"):
        export_model(checkpoint_in(folder / "live"), tmp_path / "out", ExportOptions(dtype=dtype, check=True))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_and_the_next_one_succeeds(saved: Saved, worlds: Worlds, tmp_path: Path) -> None:
    _, folder, _ = saved("llama", "one")
    checkpoint = checkpoint_in(folder / "live")
    worlds(1).start(slow_export, checkpoint=checkpoint, out=tmp_path / "out")
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial/model.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worlds(1).kill()
    assert not (tmp_path / "out").exists()
    export_model(checkpoint, tmp_path / "out", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def slow_export(checkpoint: Path, out: Path) -> None:
    """An export that waits in the middle of its shard."""
    read = to_hf.SavedWeights.read_merged
    calls: list[int] = []

    def slow_read(self: to_hf.SavedWeights, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) > 1:
            time.sleep(60)
        return read(self, keys)

    with patch.object(to_hf.SavedWeights, "read_merged", slow_read):
        export_model(checkpoint, out, ExportOptions())


def test_a_model_that_hugging_face_has_not_is_refused(saved: Saved, tmp_path: Path) -> None:
    _, folder, _ = saved("llama", "one")
    found = to_hf.find_at

    def plain(*arguments: Any) -> Any:
        one = found(*arguments)
        model = {**one.manifest.config["model"], "mlp": "gelu"}
        return replace(one, manifest=replace(one.manifest, config={**one.manifest.config, "model": model}))

    with patch.object(to_hf, "find_at", plain), pytest.raises(ValueError, match="model.mlp gelu"):
        export_model(checkpoint_in(folder / "live"), tmp_path / "out", ExportOptions())

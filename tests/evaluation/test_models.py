"""A path is opened as what it is, and refused where it is nothing of use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_step.config.data import DataConfig
from megatron_step.data.train_tokenizer import train_tokenizer
from megatron_step.evaluation.models import open_model


def test_a_run_a_checkpoint_and_an_export_are_one_model(trained: Path, exported: Path) -> None:
    checkpoint = max((trained / "checkpoints").iterdir())
    tokens = torch.arange(20).reshape(2, 10)
    logits = []
    for path in (trained, checkpoint, exported):
        with open_model(path, seq_length=16) as model:
            assert (model.seq_length, model.tokenizer.vocab_size) == (16, 400)
            assert (model.inspected is None) == (path == exported)
            logits.append(model.logits(tokens).detach())
    assert logits[0].shape == (2, 10, 400)
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-5, atol=1e-5)


def test_windows_longer_than_the_model_is_made_for(trained: Path, exported: Path) -> None:
    for path in (trained, exported):
        with pytest.raises(ValueError, match="(made for|the context of) .*32 tokens"), open_model(path, seq_length=33):
            pass


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: give a checkpoint"):
        open_model(tmp_path / "nowhere").__enter__()
    with pytest.raises(ValueError, match="is not a model: give a checkpoint"):
        open_model(tmp_path).__enter__()


def test_another_tokenizer(trained: Path, exported: Path, small_data: DataConfig, tmp_path: Path) -> None:
    text = Path(small_data.tokenizer).with_name("text.txt")
    for size in (380, 420):
        train_tokenizer([text], tmp_path / f"{size}.model", vocab_size=size)
    with pytest.raises(ValueError, match="is not the tokenizer that the model was trained with"):
        open_model(trained, str(tmp_path / "380.model")).__enter__()
    with pytest.raises(ValueError, match="has 420 tokens, but the model's vocabulary has 400"):
        open_model(exported, str(tmp_path / "420.model")).__enter__()


def test_an_exported_model_that_is_not_whole(exported: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(exported, model)
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="lacks the tensor model.norm.weight"):
        open_model(model).__enter__()
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, weights)
    with pytest.raises(ValueError, match="has model.norm.weight in shape"):
        open_model(model).__enter__()
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or damaged"):
        open_model(model).__enter__()
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        open_model(model).__enter__()

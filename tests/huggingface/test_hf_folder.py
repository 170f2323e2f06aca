"""The model of a folder equals the model that transformers loads, or the error names the reason."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_checkpoints import word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_step.huggingface.from_hf import import_model
from megatron_step.huggingface.hf_folder import open_folder
from megatron_step.huggingface.to_hf import ExportOptions, export_model

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def llama(tied: bool = False, seed: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = {"max_position_embeddings": 32, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **positions, vocab_size=40, tie_word_embeddings=tied))


def saved(folder: Path, model: LlamaForCausalLM, **sharding: str) -> Path:
    model.save_pretrained(folder, **sharding)
    return word_tokenizer(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.arange(24)[None] % 40).logits


def assert_round_trip(folder: Path, tmp_path: Path) -> None:
    import_model(folder, tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "back", ExportOptions())
    assert torch.equal(logits(tmp_path / "back"), logits(folder))


def test_another_head_beside_a_tied_config_stays_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", llama(tied=True))
    change_tensors(folder, lambda tensors: tensors.update({_HEAD: tensors[_EMBEDDING] + 0.1}))
    opened = open_folder(folder, None)
    assert not opened.model.tie_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight" in opened.notes[0]
    assert_round_trip(folder, tmp_path)


def test_the_same_head_beside_a_tied_config_is_dropped(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", llama(tied=True))
    change_tensors(folder, lambda tensors: tensors.update({_HEAD: tensors[_EMBEDDING].clone()}))
    opened = open_folder(folder, None)
    assert opened.model.tie_embeddings
    assert opened.notes == []
    assert_round_trip(folder, tmp_path)


def test_a_head_alone_is_the_embedding_of_a_tied_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", llama(tied=True))
    change_tensors(folder, lambda tensors: tensors.update({_HEAD: tensors.pop(_EMBEDDING)}))
    assert open_folder(folder, None).model.tie_embeddings
    assert_round_trip(folder, tmp_path)


@pytest.mark.parametrize("keeps_shards", [True, False])
def test_a_single_file_counts_and_an_older_index_does_not(tmp_path: Path, keeps_shards: bool) -> None:
    folder = saved(tmp_path / "hf", llama(seed=1), max_shard_size="8KB")
    shards = list(folder.glob("model-*.safetensors"))
    kept = {path.name: path.read_bytes() for path in (*shards, folder / "model.safetensors.index.json")}
    llama(seed=2).save_pretrained(folder)  # which removes the shards
    for name, content in kept.items():
        if keeps_shards or name.endswith(".json"):
            (folder / name).write_bytes(content)
    assert_round_trip(folder, tmp_path)


def test_an_adapter_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", llama())
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter .*merge the adapter with peft"):
        open_folder(folder, None)


def test_more_layers_than_tensors_are_refused_at_once(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", llama())
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "num_hidden_layers": 10**12}))
    with pytest.raises(ValueError, match="has 21 tensors, but its config.json has num_hidden_layers 1,000,000,000,000"):
        open_folder(folder, None)


def test_weights_in_another_form_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", llama())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="only safetensors are supported: save pytorch_model.bin as safetensors"
    ):
        open_folder(folder, None)

"""An export keeps the settings of the imported model, also after training, and reports the ones that changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hf_checkpoints import word_tokenizer
from small_run import manifest_facts, small_config
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from megatron_step.checkpoint.manifest import read_manifest
from megatron_step.config.data import DataConfig
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.huggingface.from_hf import import_model
from megatron_step.huggingface.kept_settings import (
    generation_config,
    kept_context,
    kept_settings,
    with_kept_config,
)
from megatron_step.huggingface.to_hf import ExportOptions, export_model
from megatron_step.training.run import run

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": [1, 5],
    "pad_token_id": 9,
    "tie_word_embeddings": False,
}
GENERATION = {"eos_token_id": [1, 5], "pad_token_id": 9, "do_sample": True, "temperature": 0.2, "top_p": 0.9}
CARD = {"license": "apache-2.0", "language": ["en"], "base_model": "someone/base", "model-index": [{"name": "x"}]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "source"
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n\n# A model\n")
    (folder / "LICENSE").write_text("Apache License\n")
    return word_tokenizer(folder)


def test_an_export_says_what_the_import_said(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "imported", seq_length=16)
    said: list[str] = []
    export_model(tmp_path / "imported", tmp_path / "out", ExportOptions(check=True), say=said.append)
    assert said == []
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: written[name] for name in CONFIG} == CONFIG
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == GENERATION
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["language"], front["base_model"]) == ("apache-2.0", ["en"], "someone/base")
    assert "model-index" not in front
    assert "token 1 ended each document" in card
    assert (tmp_path / "out/LICENSE").read_text() == "Apache License\n"
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 512


def test_what_training_changed_is_said(source: Path) -> None:
    kept = kept_settings(source)
    assert kept_context(kept) == 512
    trained = {"model_type": "llama", "num_hidden_layers": 3, "max_position_embeddings": 1024, "eos_token_id": 7}
    architecture, changes = with_kept_config({**trained, "bos_token_id": 4, "tie_word_embeddings": False}, kept)
    assert (architecture["eos_token_id"], architecture["bos_token_id"]) == ([1, 5, 7], 0)
    assert changes == [
        "num_hidden_layers 1 -> 3",
        "max_position_embeddings 512 -> 1024",
        "token 7, which ended documents in training, is a stop token, too",
    ]
    assert generation_config(architecture, kept) == {**GENERATION, "eos_token_id": [1, 5, 7]}


def test_a_model_that_was_not_imported_has_no_settings_of_sampling() -> None:
    architecture, changes = with_kept_config({"bos_token_id": None, "eos_token_id": 1}, {})
    assert changes == []
    assert generation_config(architecture, {}) == {"bos_token_id": None, "eos_token_id": 1}


def test_a_window_stays_while_the_layers_do() -> None:
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": ["a", "b"]}
    kept = {"model_type": "qwen2", "window": window, "config": {}, "shape": {"num_hidden_layers": 2}}
    shape = {"model_type": "qwen2", "max_position_embeddings": 512, "eos_token_id": 1, "bos_token_id": None}
    same, changes = with_kept_config({**shape, "num_hidden_layers": 2}, kept)
    assert (same["sliding_window"], same["layer_types"], changes) == (64, ["a", "b"], [])
    grown, changes = with_kept_config({**shape, "num_hidden_layers": 3}, kept)
    assert "sliding_window" not in grown
    assert grown["max_position_embeddings"] == 64
    assert "the sliding window of some layers is omitted" in changes[0]
    mistral = {**kept, "model_type": "mistral", "window": {"sliding_window": 64}}
    back, changes = with_kept_config({**shape, "model_type": "llama", "num_hidden_layers": 2}, mistral)
    assert (back["model_type"], back["sliding_window"], changes) == ("mistral", 64, [])


def test_a_run_that_starts_from_it_passes_them_on(tmp_path: Path, small_data: DataConfig) -> None:
    vocab_size = load_tokenizer(small_data.tokenizer).vocab_size
    LlamaForCausalLM(LlamaConfig(**{**CONFIG, "vocab_size": vocab_size})).save_pretrained(tmp_path / "hf")
    imported = import_model(tmp_path / "hf", tmp_path / "imported", 32, small_data.tokenizer)
    shape = {**vars(imported.model), "num_layers": 2, "max_position_embeddings": None}
    stages = {"count": 2, "layers": [1, 1], "steps": [0, 1], "start_from": str(tmp_path / "imported")}
    growth = {"init": "identity"}
    assert run(small_config(str(tmp_path / "run"), model=shape, data=small_data, stages=stages, growth=growth))
    said: list[str] = []
    export_model(tmp_path / "run", tmp_path / "out", ExportOptions(), say=said.append)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["max_position_embeddings"], written["pad_token_id"]) == (512, 9)
    assert said[0] == "num_hidden_layers 1 -> 2"


def test_loosely_written_settings_do_not_spoil_an_export(source: Path, tmp_path: Path) -> None:
    loose = {"eos_token_id": ["1", 5.0], "pad_token_id": "9", "use_cache": "yes", "id2label": [1]}
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **loose}))
    kept = kept_settings(tmp_path)["config"]
    assert (kept["eos_token_id"], kept["pad_token_id"]) == ([1, 5], 9)
    assert not {"use_cache", "id2label"} & kept.keys()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": {"a": 1}}')
    with pytest.raises(ValueError, match="generation_config.json has eos_token_id .* must be a token id"):
        kept_settings(tmp_path)


def test_a_card_that_cannot_be_read_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="front matter of .*README.md is not valid YAML") as raised:
        kept_settings(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_manifest_of_before_keeps_nothing(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "imported", seq_length=16)
    (path,) = (tmp_path / "imported/checkpoints").iterdir()
    values = json.loads((path / "manifest.json").read_text())
    assert values.pop("kept_settings")["config"]["pad_token_id"] == 9
    (path / "manifest.json").write_text(json.dumps(values))
    assert read_manifest(path).kept_settings == {}
    assert "kept_settings" not in manifest_facts(small_config())
    export_model(tmp_path / "imported", tmp_path / "out", ExportOptions())
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 512

"""peft loads the adapters of an export, and its logits are those of the merged model."""

import json
from pathlib import Path

import pytest
import torch
from hf_checkpoints import grown_config, save_stages, word_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from worlds import Worlds

from megatron_step.huggingface.to_hf import ExportOptions, export_model


@pytest.fixture(scope="module")
def checkpoints(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint from the middle of a stage, for each set of linears with adapters."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = word_tokenizer(folder / "tokenizer")
    targets = {"all": {}, "some": {"targets": ["qkv", "fc2"], "alpha": 6, "dropout": 0.1}}
    configs = [grown_config("qwen2", "one", tokenizer, adapter=adapter) for adapter in targets.values()]
    folders = [folder / name for name in targets]
    worlds(1).run(save_stages, configs=configs, folders=folders, merges=False)
    return {path.name: next((path / "live").iterdir()) for path in folders}


@pytest.mark.parametrize("targets", ["all", "some"])
@torch.no_grad()
def test_logits_are_those_of_the_merged_model(checkpoints: dict[str, Path], tmp_path: Path, targets: str) -> None:
    comparison = export_model(checkpoints[targets], tmp_path / "apart", ExportOptions(adapter_only=True, check=True))
    assert comparison is not None
    assert comparison.max_difference <= 1e-5 * comparison.largest_logit
    export_model(checkpoints[targets], tmp_path / "merged", ExportOptions())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "apart/base", dtype=torch.float32)
    tokens = torch.arange(30)[None] * 11 % 250
    plain = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "apart/adapter").eval()(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    assert (adapted - merged).abs().max() <= 1e-5 * merged.abs().max()
    assert (plain - merged).abs().max() > 1e-2 * merged.abs().max()


def test_only_what_has_adapters_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    export_model(checkpoints["some"], tmp_path / "out", ExportOptions(adapter_only=True))
    written = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert written["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
    assert written["layers_to_transform"] == [0, 2]  # the new layer lies between the old ones
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 6, 0.1)
    assert len(load_file(tmp_path / "out/adapter/adapter_model.safetensors")) == 2 * 2 * 4


def test_a_model_without_adapters_has_none_to_export(worlds: Worlds, tmp_path: Path) -> None:
    config = grown_config("llama", "one", word_tokenizer(tmp_path / "tokenizer"), adapter={"rank": 0})
    worlds(1).run(save_stages, configs=[config], folders=[tmp_path], merges=False)
    checkpoint = next((tmp_path / "live").iterdir())
    with pytest.raises(ValueError, match="has no adapters: export it without --adapter-only"):
        export_model(checkpoint, tmp_path / "out", ExportOptions(adapter_only=True))

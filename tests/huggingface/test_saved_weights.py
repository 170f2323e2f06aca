"""Weights are read whole and merged in fp32 by their formula, without a model."""

from pathlib import Path

import torch
from hf_checkpoints import grown_config, save_stages, word_tokenizer
from small_run import read_checkpoint
from worlds import Worlds

from megatron_step.checkpoint.load import find_at
from megatron_step.engine.parallel import Parallel
from megatron_step.huggingface.saved_weights import SavedWeights


def test_adapters_are_merged_and_rounded_by_the_reader_only(worlds: Worlds, tmp_path: Path, alone: Parallel) -> None:
    config = grown_config("llama", "one", word_tokenizer(tmp_path / "tokenizer"), training={"precision": "bf16"})
    worlds(1).run(save_stages, configs=[config], folders=[tmp_path], merges=False)
    found = find_at(next((tmp_path / "live").iterdir()), alone)
    saved, whole = SavedWeights(found), read_checkpoint(found.path)
    key, norm = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert len(saved.adapted) == 2 * 4
    plain, merged = saved.read([key, norm]), saved.read_merged([norm, key])
    assert torch.equal(plain[key], whole[key])
    assert plain[key].dtype == merged[norm].dtype == torch.bfloat16
    a, b = (whole[f"decoder.layers.0.mlp.linear_fc1.adapter.linear_{side}.weight"].double() for side in ("in", "out"))
    expected = whole[key].double() + 8 / 4 * b @ a  # small_config's alpha and rank
    assert merged[key].dtype == torch.float32
    assert list(merged) == [norm, key]
    assert (merged[key] - expected).abs().max() < 1e-6 < (plain[key] - expected).abs().max()

"""A Hugging Face model is loaded whole, in the number format asked for, or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_step.export.transformers_model import load_in_transformers


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes)).to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        model = load_in_transformers(tmp_path, dtype)
        assert not model.training
        assert {param.dtype for param in model.parameters()} == {expected}
        assert torch.equal(model.get_input_embeddings().weight, made.get_input_embeddings().weight.to(expected))
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no tensor model.norm.weight"):
        load_in_transformers(tmp_path, "auto")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_in_transformers(tmp_path, "auto")

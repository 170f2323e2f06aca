"""A Hugging Face model is loaded in the number format asked for."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_step.huggingface.transformers_model import load_in_transformers


def test_weights_and_their_number_format(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        model = load_in_transformers(tmp_path, dtype)
        assert not model.training
        loaded = dict(model.named_parameters())
        assert {param.dtype for param in loaded.values()} == {expected}
        assert all(torch.equal(loaded[name], param.to(expected)) for name, param in made.named_parameters())

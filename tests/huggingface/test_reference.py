"""The formula in fp64 is what transformers computes, but for its rounding, for every architecture."""

from pathlib import Path

import pytest
import torch
from hf_checkpoints import MODELS
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_step.config.model import ModelConfig
from megatron_step.huggingface.architectures import hf_config
from megatron_step.huggingface.reference import reference_logits

_SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_what_transformers_computes(tmp_path: Path, name: str) -> None:
    values = hf_config(ModelConfig(**{**_SIZES, **MODELS[name]}), 250, "float32", None, 1)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32).eval()
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(60).view(2, 30) * 7 % 250
    theirs = model(tokens).logits
    ours = reference_logits(tmp_path, None, tokens)
    assert ours.dtype == torch.float64
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())

"""Every tensor of transformers' models has its place in a checkpoint's weights, and comes back from it."""

from typing import Any

import pytest
import torch
from hf_checkpoints import MODELS
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_step.config.model import ModelConfig
from megatron_step.huggingface.architectures import hf_config
from megatron_step.huggingface.hf_mapping import MappedWeight, hf_mapping

_CLASSES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
    model = ModelConfig(**{**sizes, "seq_length": 32, **MODELS[name]})
    values = hf_config(model, 250, "float32", None, 1)
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(_CLASSES[values["model_type"]](**values))
    expected = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
    if model.tie_embeddings:
        del expected["lm_head.weight"]
    shapes = {name: shape for weight in hf_mapping(model, 250) for name, shape in weight.hf_shapes.items()}
    assert shapes == expected


def test_query_heads_of_a_group_stand_before_its_key_and_value() -> None:
    # Two groups of three query heads; heads of two rows, each with its own number.
    weight = MappedWeight("qkv", (20, 1), ("q", "k", "v"), (3, 1, 1), 2)
    fused = torch.tensor([0, 1, 2, 10, 20, 3, 4, 5, 11, 21]).repeat_interleave(2)[:, None]
    parts = weight.split(fused)
    assert parts["q"].flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert parts["k"].flatten().tolist() == [10, 10, 11, 11]
    assert parts["v"].flatten().tolist() == [20, 20, 21, 21]
    assert torch.equal(weight.join(parts), fused)


def test_padding_rows_go_and_come_as_zeros() -> None:
    weight = MappedWeight("embedding", (4, 2), ("embed",), padding=1)
    whole = torch.arange(1.0, 9.0).view(4, 2)
    assert weight.hf_shapes == {"embed": (3, 2)}
    assert torch.equal(weight.split(whole)["embed"], whole[:3])
    assert torch.equal(weight.join(weight.split(whole)), torch.cat((whole[:3], torch.zeros(1, 2))))

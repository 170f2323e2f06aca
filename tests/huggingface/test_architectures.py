"""config.json says in transformers what our config says, both ways; what ours cannot say is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hf_checkpoints import MODELS
from transformers import AutoConfig

from megatron_step.config.model import ModelConfig
from megatron_step.huggingface.architectures import hf_config, model_config

_SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
LLAMA = ModelConfig(**_SIZES, seq_length=32)


def written(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_config_comes_back(tmp_path: Path, name: str) -> None:
    model = ModelConfig(**{**_SIZES, "seq_length": 32, **MODELS[name]})
    folder = written(tmp_path, hf_config(model, 250, "bfloat16", 0, 1))
    expected = replace(
        model,
        max_position_embeddings=32,
        vocab_size=250,
        num_query_groups=model.query_groups,
        head_size=model.attention_head_size,
    )
    assert model_config(folder, None) == expected
    assert model_config(folder, 16) == replace(expected, seq_length=16)
    theirs = AutoConfig.from_pretrained(folder)
    assert theirs.rope_parameters["rope_theta"] == model.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if model.rope_scaling.factor > 1 else "default")
    assert str(theirs.dtype) == "torch.bfloat16"


def test_a_window_that_no_token_leaves_is_none(tmp_path: Path) -> None:
    values = hf_config(LLAMA, 250, "float32", None, 1)
    mistral = {**values, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    assert model_config(written(tmp_path, mistral), 16).seq_length == 16
    with pytest.raises(ValueError, match="sliding window of 16 tokens.*--seq-length to 16"):
        model_config(tmp_path, None)
    qwen = {**values, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}
    assert model_config(written(tmp_path, qwen), None).qkv_bias, "it does not use its window"
    with pytest.raises(ValueError, match="sliding window"):
        model_config(written(tmp_path, {**qwen, "use_sliding_window": True, "max_window_layers": 1}), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": None},
            "has the architecture LlamaForCausalLM, but model_type null, which is not supported: correct",
        ),
        ({"model_type": "LLaMA"}, 'architecture LlamaForCausalLM, but model_type "LLaMA"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, which is not supp"),
        (
            {"model_type": "gpt2", "architectures": None},
            "architecture gpt2, which is not supported: import one of LlamaForCausalLM",
        ),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type linear, which is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"factor": 2.0}}, "by 2, but gives no rope_type"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "transformers rejects .*config.json .*low_freq",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            {"layer_types": ["full_attention", "linear_attention"], "model_type": "qwen2", "architectures": None},
            "linear",
        ),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture .*which is not supported"),
        ({"model_type": ["llama"]}, "which is not supported"),
        ({"num_hidden_layers": 0}, "config.json: model.num_layers must be at least 1, not 0"),
        ({"num_key_value_heads": 3}, "not divisible by model.num_query_groups 3"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = written(tmp_path, {**hf_config(LLAMA, 250, "float32", None, 1), **values})
    with pytest.raises(ValueError, match=message):
        model_config(folder, None)


def test_a_window_is_that_of_every_layer_where_the_kinds_of_layers_do_not_count(tmp_path: Path) -> None:
    values = {**hf_config(LLAMA, 250, "float32", None, 1), "layer_types": ["full_attention"] * 2, "sliding_window": 16}
    mistral = {**values, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    with pytest.raises(ValueError, match="sliding window of 16"):
        model_config(written(tmp_path, mistral), None)


def test_samples_may_be_shorter_than_the_context(tmp_path: Path) -> None:
    written(tmp_path, hf_config(LLAMA, 250, "float32", None, 1))
    model = model_config(tmp_path, 16)
    assert (model.seq_length, model.context_length) == (16, 32)
    assert hf_config(model, 250, "float32", None, 1)["max_position_embeddings"] == 32


def test_a_width_that_llama_does_not_take_is_a_mistral(tmp_path: Path) -> None:
    model = replace(LLAMA, head_size=16, num_attention_heads=3)
    values = hf_config(model, 250, "float32", None, 1)
    assert (values["architectures"], values["sliding_window"]) == (["MistralForCausalLM"], None)
    assert model_config(written(tmp_path, values), None).attention_head_size == 16


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a Hugging Face model"):
        model_config(tmp_path, None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        model_config(tmp_path, None)
    with pytest.raises(ValueError, match="set it to at most 32"):
        model_config(written(tmp_path, hf_config(LLAMA, 250, "float32", None, 1)), 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": "gelu"}, "model.mlp gelu"),
        ({"qk_norm": True, "qkv_bias": True}, "both model.qkv_bias"),
    ],
)
def test_a_model_that_no_architecture_computes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_config(replace(LLAMA, **change), 250, "float32", None, 1)

"""Values of config.json get their types; what has none, or is not known, is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.config.model import ModelConfig
from megatron_step.huggingface.architectures import hf_config, model_config
from megatron_step.huggingface.config_json import read_config

LLAMA = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, seq_length=32)
SOUND: dict[str, Any] = hf_config(LLAMA, 250, "float32", None, 1)


def folder_with(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps({**SOUND, **values}))
    return folder


@pytest.mark.parametrize(
    "loose",
    [
        {"rms_norm_eps": "1e-5"},
        {"is_causal": True},
        {"num_hidden_layers": 2.0},
        {"num_hidden_layers": "2"},
        {"vocab_size": "250.0"},
        {"tie_word_embeddings": None},
        {"tie_word_embeddings": 0},
        {"tie_word_embeddings": "false"},
        {"num_key_value_heads": None},
        {"head_dim": None},
        {"rope_theta": "10000"},
        {"rope_theta": 10000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}, "rope_theta": None},
        {"hidden_act": "swish"},
        {"attention_bias": None},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": None},
        {"torch_dtype": 5},
        {"id2label": [1], "eos_token_id": "2", "use_cache": "yes"},
        {"_name_or_path": 3, "is_llama_config": True, "rope_interleaved": False, "unsloth_version": "2025.1"},
        {"final_logit_softcapping": None, "logit_scale": 1.0, "resid_pdrop": 0.0},
    ],
)
def test_a_loosely_written_value_is_read_as_it_is_meant(tmp_path: Path, loose: dict[str, Any]) -> None:
    assert model_config(folder_with(tmp_path, loose), None) == model_config(folder_with(tmp_path, {}), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"is_causal": False}, "has is_causal false, which is not supported"),
        ({"is_causal": None}, "has is_causal null, which is not supported"),
        ({"rms_norm_eps": "small"}, 'has rms_norm_eps "small": it must be a number'),
        ({"rms_norm_eps": None}, "has rms_norm_eps null: it must be a number"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps NaN: it must be a number"),
        ({"num_hidden_layers": 2.5}, "has num_hidden_layers 2.5: it must be a whole number"),
        ({"hidden_size": [64]}, r"has hidden_size \[64\]: it must be a whole number"),
        ({"hidden_size": True}, "has hidden_size true: it must be a whole number"),
        ({"vocab_size": 1e400}, "has vocab_size Infinity: it must be a whole number"),
        ({"tie_word_embeddings": "maybe"}, 'has tie_word_embeddings "maybe": it must be true or false'),
        ({"hidden_act": 1}, "has hidden_act 1: it must be text"),
        ({"rope_parameters": [1]}, r"has rope_parameters \[1\]: it must be a JSON object"),
        ({"rope_parameters": {"rope_theta": {}}}, "has rope_parameters.rope_theta {}: it must be a number"),
        ({"rope_scaling": {"mrope_section": [16]}}, r"has rope_scaling.mrope_section \[16\], which is not supported"),
        ({"layer_types": 3}, "has layer_types 3: it must be a list of texts"),
        ({"final_logit_softcapping": 30.0}, "has final_logit_softcapping 30.0, which is not supported: remove it"),
        ({"residual_multiplier": 0.22}, "has residual_multiplier 0.22"),
        ({"rope_interleaved": True}, "has rope_interleaved true"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "has per_layer_config"),
        ({"quantization": {"bits": 4}}, 'has quantization {"bits": 4}'),
        ({"transformers_weights": "other.safetensors"}, "has transformers_weights"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map .* models with Python code"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_config(folder_with(tmp_path, values))
    assert "\n" not in str(raised.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    for text in ("{", "[]", "[" * 100_000, "\udcff"):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match="config.json (is|does) not"):
            read_config(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)
_ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"]),
    _JSON | st.sampled_from(["default", "llama3", "linear"]),
)
_KEYS = st.sampled_from(sorted({*SOUND, "sliding_window", "layer_types", "rope_parameters", "partial_rotary_factor"}))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(_KEYS, _JSON | _ROPE, max_size=3), st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
def test_no_value_of_any_key_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], kind: str
) -> None:
    folder = folder_with(tmp_path_factory.getbasetemp(), {"model_type": kind, "architectures": None, **values})
    try:
        model_config(folder, None)
    except ValueError as error:
        assert "\n" not in str(error)

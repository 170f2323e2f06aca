"""Convert a ModelConfig to a Hugging Face config.json and back, for dense Llama, Mistral, Qwen2 and Qwen3 models.

    qkv_bias    qk_norm    written as
    no          no         LlamaForCausalLM, or MistralForCausalLM if hidden_size / heads is not a whole number
    yes         no         Qwen2ForCausalLM
    no          yes        Qwen3ForCausalLM

Mistral differs from Llama in its sliding window, and in the widths that transformers accepts.
"""

import json
from pathlib import Path
from typing import Any

from megatron_step.config.model import ModelConfig, RopeScalingConfig
from megatron_step.huggingface.config_json import CONFIG_FILE, MODEL_KEYS, read_config

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED = ", ".join(_CLASSES.values())
"""The supported architectures, for messages."""


def hf_config(
    model: ModelConfig, vocab_size: int, dtype: str, bos_token_id: int | None, eos_token_id: int
) -> dict[str, Any]:
    """Return the config.json of a model whose vocabulary has `vocab_size` tokens.

    Releases of transformers before 5 can read it, too. It gives every value, because defaults differ between releases.

    Raises ValueError if no supported architecture fits the model.
    """
    kind = _model_type(model)
    own: dict[str, dict[str, Any]] = {"llama": {"mlp_bias": False}, "mistral": {"sliding_window": None}}
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.attention_head_size,
        "max_position_embeddings": model.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": _hf_rope_scaling(model.rope_scaling),
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        **({"attention_bias": False} if kind != "qwen2" else {}),
        **own.get(kind, {"use_sliding_window": False}),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _model_type(model: ModelConfig) -> str:
    if model.mlp != "swiglu":
        raise ValueError(
            f"a model with model.mlp {model.mlp} cannot be exported: the supported architectures need model.mlp swiglu"
        )
    if model.qkv_bias and model.qk_norm:
        raise ValueError(
            "a model with both model.qkv_bias and model.qk_norm cannot be exported: Qwen2 has the bias only, and Qwen3 "
            "the norm only"
        )
    if model.qkv_bias or model.qk_norm:
        return "qwen2" if model.qkv_bias else "qwen3"
    return "mistral" if model.hidden_size % model.num_attention_heads else "llama"


def _hf_rope_scaling(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    if scaling.factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def model_config(folder: Path, seq_length: int | None) -> ModelConfig:
    """Return the ModelConfig of a Hugging Face model's folder, for training samples of `seq_length` tokens.

    None for `seq_length` takes the model's context length, which is also the largest value.

    Raises ValueError for an architecture or a setting that is not supported, and OSError without config.json.
    """
    written = read_config(folder)
    kind = _supported_type(folder, written)
    config = _transformers_config(folder, kind, written)
    longest = config.max_position_embeddings
    seq_length = longest if seq_length is None else seq_length
    if seq_length > longest:
        raise ValueError(
            f"--seq-length {seq_length} is larger than the context of {folder}, {longest:,} tokens: set it to at most "
            f"{longest}"
        )
    _check_switches(folder, config, seq_length)
    try:
        return ModelConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            seq_length=seq_length,
            max_position_embeddings=longest,
            num_query_groups=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None),
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            norm_epsilon=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"],
            rope_scaling=_rope_scaling(folder, config.rope_parameters),
            init_std=config.initializer_range,
        )
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{folder / CONFIG_FILE}: {error}") from None


def _transformers_config(folder: Path, kind: str, written: dict[str, Any]) -> Any:
    """Make transformers' config from the values that change the model; transformers knows the defaults of the others.

    Raises ValueError if transformers rejects the values.
    """
    from transformers import AutoConfig

    values = {name: written[name] for name in (*MODEL_KEYS, "layer_types") if written.get(name) is not None}
    if "num_key_value_heads" in written and written["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    if "sliding_window" in written:
        values["sliding_window"] = written["sliding_window"]  # null means no window
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers raises errors of many classes
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers rejects {folder / CONFIG_FILE} ({reason}): correct the file") from None


def _supported_type(folder: Path, written: dict[str, Any]) -> str:
    """Return the model_type of a supported architecture; raise ValueError for any other."""
    kind, names = written.get("model_type"), written.get("architectures")
    known = _CLASSES.get(kind) if isinstance(kind, str) else None
    names = [names] if isinstance(names, str) else names or [known or kind]
    if known is None or names != [known]:
        shown = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
        if names in [[name] for name in _CLASSES.values()]:
            raise ValueError(
                f"{folder / CONFIG_FILE} has the architecture {shown}, but model_type {json.dumps(kind)}, which is not "
                "supported: correct model_type"
            )
        raise ValueError(f"{folder} has the architecture {shown}, which is not supported: import one of {SUPPORTED}")
    return str(kind)


def _check_switches(folder: Path, config: Any, seq_length: int) -> None:
    """Raise ValueError for a setting that our model does not support."""
    wrong = [f"{name} true" for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if config.hidden_act not in ("silu", "swish"):  # two names of one function
        wrong.append(f"hidden_act {config.hidden_act}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"partial_rotary_factor {config.rope_parameters['partial_rotary_factor']}")
    kinds = getattr(config, "layer_types", None) or []
    wrong += [f"layer_types {kind}" for kind in sorted({*kinds} - {"full_attention", "sliding_attention"})]
    if wrong:
        raise ValueError(
            f"the config.json of {folder} has {', '.join(wrong)}, which is not supported: import another model"
        )
    # Qwen has a sliding window only in layers of the type sliding_attention; the others ignore layer_types.
    slides = "sliding_attention" in kinds or config.model_type in ("llama", "mistral")
    window = getattr(config, "sliding_window", None)
    if window is not None and slides and window < seq_length:
        raise ValueError(
            f"{folder} has a sliding window of {window:,} tokens, shorter than samples of {seq_length:,} tokens: set "
            f"--seq-length to {window} or less"
        )


def _rope_scaling(folder: Path, rope: dict[str, Any]) -> RopeScalingConfig:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        if rope.get("factor", 1.0) != 1.0:
            raise ValueError(
                f"{folder} scales its rotary embedding by {rope['factor']:g}, but gives no rope_type: add it to "
                "config.json"
            )
        return RopeScalingConfig()
    if kind != "llama3":
        raise ValueError(
            f"{folder} has the rope_type {kind}, which is not supported: import a model with rope_type default or "
            "llama3"
        )
    return RopeScalingConfig(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )

"""Read a Hugging Face model's config.json: values in their right types, and no unknown key that could matter.

Old tools and people write values loosely, such as "1e-5" for 1e-5 or 2.0 for 2; these are accepted. A key that is not
in a list of this file could change the model's function. Such a key is an error unless its value switches it off.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_step.config import yaml_json

CONFIG_FILE = "config.json"


def whole_number(value: Any) -> int:
    """Convert an integer, a float or a text to an integer.

    Raises ValueError or TypeError if `value` is not a whole number.
    """
    number = float(value) if isinstance(value, str) and not value.strip().lstrip("+-").isdigit() else value
    if isinstance(number, bool) or (isinstance(number, float) and not number.is_integer()):
        raise ValueError
    return int(number)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _switch(value: Any) -> bool:
    named = value.lower() if isinstance(value, str) else value
    for switch, names in ((True, (True, "true", "1")), (False, (False, "false", "0"))):
        if isinstance(named, (bool, int, str)) and named in names:
            return switch
    raise ValueError


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


_KINDS: dict[Callable[[Any], Any], str] = {
    whole_number: "a whole number",
    _real: "a number",
    _switch: "true or false",
    _text: "text",
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NEEDED = (*_SIZES, "max_position_embeddings", "rms_norm_eps")  # keys that may not be null
_TYPES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys((*_SIZES, "num_key_value_heads", "head_dim"), whole_number),
    **dict.fromkeys(("max_position_embeddings", "sliding_window", "max_window_layers"), whole_number),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor"), _real),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _switch),
    "hidden_act": _text,
}
_ROPE_TYPES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("rope_type", "type"), _text),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"), _real),
    "original_max_position_embeddings": whole_number,
}
_ROPE = ("rope_parameters", "rope_scaling")
MODEL_KEYS = (*_TYPES, *_ROPE)
"""Keys that change what a model computes; `layer_types`, which names the layers with a sliding window, does so, too."""
_READ = {*MODEL_KEYS, "layer_types", "model_type", "architectures"}

_WITHOUT_EFFECT = {
    # Number formats, files and versions.
    *("dtype", "torch_dtype", "transformers_version", "transformers.js_config", "tokenizer_class", "base_model"),
    *("unsloth_version", "unsloth_fixed", "is_llama_config", "model_max_length", "max_sequence_length", "seq_length"),
    *("attn_implementation", "use_flash_attn", "use_flash_attention", "pretraining_tp", "torchscript", "chat_template"),
    # Tokens, dropout and outputs, which a run's config sets; labels of other tasks.
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "image_token_id"),
    *("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix"),
    *("output_router_logits", "keys_to_ignore_at_inference", "neftune_noise_alpha", "tf_legacy_loss", "use_bfloat16"),
}
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
_ON = {"is_causal"}  # keys that change what a model computes unless they are true


def read_config(folder: Path) -> dict[str, Any]:
    """Return all values of a model's config.json, converted to their types.

    Raises FileNotFoundError without the file, and ValueError for a value of the wrong type or an unknown key.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    custom = values.get("auto_map")
    if custom:
        raise ValueError(
            f"{path} has auto_map {_shown(custom)}: models with Python code in their folder are not supported. Import "
            "another model"
        )
    typed = {name: _typed(path, name, name, value, _TYPES) for name, value in values.items()}
    for name in _ROPE:
        typed[name] = _rope(path, name, values.get(name))
    layers = values.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(isinstance(kind, str) for kind in layers)):
        raise ValueError(f"{path} has layer_types {_shown(layers)}: it must be a list of texts")
    unknown = [f"{name} {_shown(value)}" for name, value in values.items() if not _is_understood(name, value)]
    if unknown:
        raise ValueError(
            f"{path} has {', '.join(unknown)}, which is not supported: remove it if it does not change what the model "
            "computes"
        )
    return typed


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file with an object in a model's folder.

    Raises FileNotFoundError if there is no such file, and ValueError if it does not hold a JSON object.
    """
    try:
        values = yaml_json.read_json(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(
            f"{path.parent} is not a Hugging Face model, because it has no {path.name}: give the folder of a model"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not the config of a model, because it holds no JSON object: get an undamaged copy")
    return values


def _typed(path: Path, name: str, key: str, value: Any, types: dict[str, Callable[[Any], Any]]) -> Any:
    """Convert the value of `key`, which messages call `name`, to its type; raise ValueError if that fails."""
    if key not in types or (value is None and key not in _NEEDED):
        return value
    try:
        return types[key](value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{path} has {name} {_shown(value)}: it must be {_KINDS[types[key]]}") from None


def _rope(path: Path, name: str, values: Any) -> dict[str, Any] | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{path} has {name} {_shown(values)}: it must be a JSON object")
    unknown = [f"{name}.{key} {_shown(value)}" for key, value in values.items() if key not in _ROPE_TYPES]
    if unknown:
        raise ValueError(f"{path} has {', '.join(unknown)}, which is not supported: import another model")
    typed = {key: _typed(path, f"{name}.{key}", key, value, _ROPE_TYPES) for key, value in values.items()}
    return {key: value for key, value in typed.items() if value is not None}


def _is_understood(name: str, value: Any) -> bool:
    if name in _ON:
        return value is True
    if name in _READ or name in _WITHOUT_EFFECT or name.startswith("_") or name in _library_keys():
        return True
    return value in _OFF or (value == 1 and name.endswith(("multiplier", "scale", "factor")))


def _library_keys() -> set[str]:
    """Keys that transformers accepts for every model; this file reads those that matter to a dense decoder."""
    from transformers import GenerationConfig, PreTrainedConfig

    return {*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict()}


def _shown(value: Any) -> str:
    """Return a value as JSON on one line, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

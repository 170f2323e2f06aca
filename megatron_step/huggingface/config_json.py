"""config.json of a Hugging Face model: its values in their right types, and nothing in it that is not understood.

A value may be written loosely, as old tools and people do: "1e-5" for 1e-5, 2.0 for 2. A key that no list here has
could change what the model computes, so it is refused unless it is switched off.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"


def whole_number(value: Any) -> int:
    """An integer, written as one, as a float or as a text; raises ValueError or TypeError if it is none."""
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
    _text: "a text",
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NEEDED = (*_SIZES, "max_position_embeddings", "rms_norm_eps")  # null is no value for these
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
"""Keys that change what a model computes; beside them, `layer_types` says which layers have a sliding window."""
_READ = {*MODEL_KEYS, "layer_types", "model_type", "architectures"}

_WITHOUT_EFFECT = {
    # Number format, files, versions.
    *("dtype", "torch_dtype", "transformers_version", "transformers.js_config", "tokenizer_class", "base_model"),
    *("unsloth_version", "unsloth_fixed", "is_llama_config", "model_max_length", "max_sequence_length", "seq_length"),
    *("attn_implementation", "use_flash_attn", "use_flash_attention", "pretraining_tp", "torchscript", "chat_template"),
    # Tokens, dropout and outputs, which training sets itself; classes of another task.
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "image_token_id"),
    *("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix"),
    *("output_router_logits", "keys_to_ignore_at_inference", "neftune_noise_alpha", "tf_legacy_loss", "use_bfloat16"),
}
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


def read_config(folder: Path) -> dict[str, Any]:
    """All values of a model's config.json, in the types that they are to have.

    Raises FileNotFoundError without the file, and ValueError for a value of another type or a key that is not known.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    custom = values.get("auto_map")
    if custom:
        raise ValueError(f"{path} has auto_map {_shown(custom)}: the model brings its own code, which is not supported")
    typed = {name: _typed(path, name, name, value, _TYPES) for name, value in values.items()}
    for name in _ROPE:
        typed[name] = _rope(path, name, values.get(name))
    layers = values.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(isinstance(kind, str) for kind in layers)):
        raise ValueError(f"{path} has layer_types {_shown(layers)}, which must be a list of texts")
    unknown = [f"{name} {_shown(value)}" for name, value in values.items() if not _is_understood(name, value)]
    if unknown:
        raise ValueError(
            f"{path} has {', '.join(unknown)}, which is not supported or not known here: remove it if the model "
            "computes the same without"
        )
    return typed


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file of a model's folder.

    Raises FileNotFoundError if there is none, and ValueError if it does not hold values by name.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} is not a Hugging Face model: it has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a model's config: it must be a JSON object")
    return values


def _typed(path: Path, name: str, key: str, value: Any, types: dict[str, Callable[[Any], Any]]) -> Any:
    """The value of `key`, which messages call `name`, in its type."""
    if key not in types or (value is None and key not in _NEEDED):
        return value
    try:
        return types[key](value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{path} has {name} {_shown(value)}, which must be {_KINDS[types[key]]}") from None


def _rope(path: Path, name: str, values: Any) -> dict[str, Any] | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{path} has {name} {_shown(values)}, which must be a JSON object")
    unknown = [f"{name}.{key} {_shown(value)}" for key, value in values.items() if key not in _ROPE_TYPES]
    if unknown:
        raise ValueError(f"{path} has {', '.join(unknown)}, which is not supported")
    typed = {key: _typed(path, f"{name}.{key}", key, value, _ROPE_TYPES) for key, value in values.items()}
    return {key: value for key, value in typed.items() if value is not None}


def _is_understood(name: str, value: Any) -> bool:
    if name in _READ or name in _WITHOUT_EFFECT or name.startswith("_") or name in _library_keys():
        return True
    return value in _OFF or (value == 1 and name.endswith(("multiplier", "scale", "factor")))


def _library_keys() -> set[str]:
    """Keys that transformers knows for every model; those that matter to a dense decoder are read here."""
    from transformers import GenerationConfig, PreTrainedConfig

    return {*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict()}


def _shown(value: Any) -> str:
    """A value as JSON writes it, on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

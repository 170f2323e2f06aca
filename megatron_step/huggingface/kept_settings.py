"""Settings of a Hugging Face model, beside its shape and weights, that are kept from import to export.

    config.json              special tokens, a sliding window, settings that do not change the model
    generation_config.json   settings for sampling
    README.md                licence, base model, languages, data sets (from the front matter)
    LICENSE, NOTICE          the whole texts

A checkpoint's manifest holds these settings, and so do the checkpoints of each run that starts from it. If training
changed a setting, the export has the new value, and `changes` describes the change.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_step.config.counts import counted
from megatron_step.config.yaml_json import parse_yaml
from megatron_step.huggingface.config_json import CONFIG_FILE, MODEL_KEYS, read_config, read_json, whole_number

Kept = dict[str, Any]
"""The kept settings as JSON values: dicts by name such as `config`, `generation` and `card`, and texts in `files`."""

GENERATION_FILE = "generation_config.json"
_SHAPE = {*MODEL_KEYS, "layer_types", "architectures", "model_type"}
_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_CHANGED = ("num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")  # reported if training changed them
_REPLACED = {"dtype", "torch_dtype", "transformers_version"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CARD = ("license", "license_name", "license_link", "language", "base_model", "datasets")
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_MOST_BYTES = 1 << 18  # largest legal text that is kept


def kept_settings(folder: Path) -> Kept:
    """Read the settings in a model's folder that an export keeps.

    Raises ValueError if one of the files is not valid.
    """
    config = read_config(folder)
    generation = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).is_file() else {}
    return {
        "model_type": config.get("model_type"),
        "shape": {name: config[name] for name in _CHANGED if config.get(name) is not None},
        "window": {name: config[name] for name in _WINDOW if name in config},
        "config": {
            name: value
            for name, value in _with_ids(folder / CONFIG_FILE, config).items()
            if name not in _SHAPE | _REPLACED
            and not name.startswith("_")
            and _is_taken(config["model_type"], name, value)
        },
        "generation": {
            name: value
            for name, value in _with_ids(folder / GENERATION_FILE, generation).items()
            if name not in _REPLACED
        },
        "card": _card(folder, config),
        "files": {
            path.name: path.read_text(encoding="utf-8", errors="replace")
            for pattern in _LEGAL
            for path in sorted(folder.glob(pattern))
            if path.is_file() and path.stat().st_size <= _MOST_BYTES
        },
    }


def _with_ids(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with token ids converted to whole numbers; an entry may be one id or a list."""
    typed = {}
    for name in [name for name in _TOKENS if values.get(name) is not None]:
        value = values[name]
        try:
            typed[name] = [whole_number(one) for one in value] if isinstance(value, list) else whole_number(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{path} has {name} {value!r}: it must be a token id or a list of token ids") from None
    return {**values, **typed}


def _is_taken(model_type: str, name: str, value: Any) -> bool:
    """Return whether transformers accepts the value; it could not load an export with a rejected one."""
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(model_type, **{name: value})
    except Exception:  # transformers raises errors of many classes
        return False
    return True


def _card(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the kept entries of README.md's front matter; `base_model` is the model that this one was made from."""
    card: dict[str, Any] = {}
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.startswith("---"):
        try:
            front = parse_yaml(text.split("---", 2)[1])
        except ValueError as error:
            raise ValueError(f"the front matter of {path} is not valid YAML ({error}): correct or remove it") from None
        if isinstance(front, dict):
            card = {name: front[name] for name in _CARD if front.get(name)}
    name = config.get("_name_or_path")
    if "base_model" not in card and isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")):
        card["base_model"] = name
    result: dict[str, Any] = json.loads(json.dumps(card, default=str))
    return result


def kept_context(kept: Kept) -> int:
    """Context length in tokens from the imported config.json; 0 if it gave none."""
    return int(kept["shape"].get("max_position_embeddings", 0)) if kept else 0


def with_kept_config(architecture: Mapping[str, Any], kept: Kept) -> tuple[dict[str, Any], list[str]]:
    """Return an export's config.json with the kept settings, and descriptions of the settings that training changed."""
    if not kept:
        return dict(architecture), []
    window, changes = _window(architecture, kept)
    shape = {**architecture, **window}
    changes += [f"{name} {old} -> {shape[name]}" for name, old in kept["shape"].items() if shape[name] != old]
    merged = {**architecture, **kept["config"], **window}
    stops = kept["config"].get("eos_token_id")
    if stops is None:
        merged["eos_token_id"] = architecture["eos_token_id"]
    else:
        merged["eos_token_id"], more = _with_stop(stops, architecture["eos_token_id"])
        changes += more
    if merged.get("bos_token_id") is None:
        merged["bos_token_id"] = architecture["bos_token_id"]
    return merged, changes


def generation_config(architecture: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return the generation_config.json of an export whose config.json is `architecture`."""
    ids = {name: architecture[name] for name in ("bos_token_id", "eos_token_id") if name in architecture}
    generation = dict(kept.get("generation", {}))
    if not generation:
        pad = architecture.get("pad_token_id")
        return ids if pad is None else {**ids, "pad_token_id": pad}
    if generation.get("eos_token_id") is None:
        return {**generation, "eos_token_id": ids["eos_token_id"]}
    own = ids["eos_token_id"]
    for stop in own if isinstance(own, list) else [own]:
        generation["eos_token_id"], _ = _with_stop(generation["eos_token_id"], stop)
    return generation


def _with_stop(stops: Any, stop: int) -> tuple[Any, list[str]]:
    """Add the token that ended documents in training to the stop tokens (one or a list), and describe the change."""
    known = stops if isinstance(stops, list) else [stops]
    if stop in known:
        return stops, []
    return [*known, stop], [f"token {stop}, which ended documents in training, is a stop token, too"]


def _window(architecture: Mapping[str, Any], kept: Kept) -> tuple[dict[str, Any], list[str]]:
    """Return the sliding-window settings and descriptions of changes; training samples never exceeded the window."""
    window = kept["window"]
    if kept["model_type"] == "mistral" and architecture["model_type"] == "llama":
        mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        return {**mistral, "sliding_window": window.get("sliding_window", _MISTRAL_WINDOW)}, []
    if kept["model_type"] != architecture["model_type"] or not window.get("use_sliding_window"):
        return {}, []
    if architecture["num_hidden_layers"] == kept["shape"].get("num_hidden_layers"):
        return window, []
    size = window.get("sliding_window") or architecture["max_position_embeddings"]
    longest = min(size, architecture["max_position_embeddings"])
    return {"max_position_embeddings": longest}, [
        "the sliding window of some layers is omitted, since the number of layers changed: the context is "
        f"{counted(longest, 'token')}"
    ]


_MISTRAL_WINDOW = 4096  # transformers' default if config.json gives none

"""What a Hugging Face model's folder says beside its shape and weights, kept from import to export.

    config.json              tokens that begin, stop and fill a text, a sliding window, what does not change the model
    generation_config.json   how transformers samples
    README.md                licence, base model, languages, data (its front matter)
    LICENSE, NOTICE          as they are

A checkpoint's manifest holds them, and so does that of each run which starts from it. What training changed, the
export's own config.json says; `changes` says it to people.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_step.huggingface.config_json import CONFIG_FILE, MODEL_KEYS, read_config, read_json, whole_number

Kept = dict[str, Any]
"""`config`, `generation` and `card`, values by name, and `files`, texts by name; JSON throughout."""

GENERATION_FILE = "generation_config.json"
_SHAPE = {*MODEL_KEYS, "layer_types", "architectures", "model_type"}
_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_CHANGED = ("num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")  # what is said if it changed
_REPLACED = {"dtype", "torch_dtype", "transformers_version"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CARD = ("license", "license_name", "license_link", "language", "base_model", "datasets")
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_MOST_BYTES = 1 << 18  # of a legal text


def kept_settings(folder: Path) -> Kept:
    """What a model's folder says beside its shape and weights.

    Raises ValueError if one of its files cannot be read.
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
    """The same with whole numbers for tokens, one or a list."""
    typed = {}
    for name in [name for name in _TOKENS if values.get(name) is not None]:
        value = values[name]
        try:
            typed[name] = [whole_number(one) for one in value] if isinstance(value, list) else whole_number(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(
                f"{path} has {name} {value!r}, which must be a token's number, or a list of some"
            ) from None
    return {**values, **typed}


def _is_taken(model_type: str, name: str, value: Any) -> bool:
    """Whether transformers reads the value: an export with another could not be loaded."""
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(model_type, **{name: value})
    except Exception:  # of many classes, the library's own and Python's
        return False
    return True


def _card(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the front matter of README.md; the base model is that which the model itself was made from."""
    card: dict[str, Any] = {}
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.startswith("---"):
        try:
            front = yaml.safe_load(text.split("---", 2)[1])
        except yaml.YAMLError as error:
            raise ValueError(f"the front matter of {path} is not YAML: {' '.join(str(error).split())}") from None
        if isinstance(front, dict):
            card = {name: front[name] for name in _CARD if front.get(name)}
    name = config.get("_name_or_path")
    if "base_model" not in card and isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")):
        card["base_model"] = name
    result: dict[str, Any] = json.loads(json.dumps(card, default=str))
    return result


def kept_context(kept: Kept) -> int:
    """Tokens that the model was made for at most, as its config.json said; 0 where it did not."""
    return int(kept["shape"].get("max_position_embeddings", 0)) if kept else 0


def with_kept_config(architecture: Mapping[str, Any], kept: Kept) -> tuple[dict[str, Any], list[str]]:
    """config.json of an export with what was kept, and what of it training changed, in words."""
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
    """generation_config.json of an export whose config.json is `architecture`."""
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
    """Stop tokens, one or a list, with the token that ended documents in training."""
    known = stops if isinstance(stops, list) else [stops]
    if stop in known:
        return stops, []
    return [*known, stop], [f"token {stop}, which ended documents in training, stops a text, too"]


def _window(architecture: Mapping[str, Any], kept: Kept) -> tuple[dict[str, Any], list[str]]:
    """The sliding window: samples were shorter, so that training did not notice it."""
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
        f"the sliding window of some layers is left out, since there are other layers: {longest:,} tokens of context"
    ]


_MISTRAL_WINDOW = 4096  # transformers' own, where config.json has none

"""Presets: named sets of keys of a config. A key that the config gives itself replaces the preset's."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from megatron_step.config.sections import in_short, merged

Preset = Literal["parity", "lean", "paper"]

_WSD_OVER_THE_RUN: dict[str, Any] = {"scope": "run", "kind": "wsd", "decay_fraction": 0.4}

_GROWN_TWICE: dict[str, dict[str, Any]] = {
    "stages": {"count": 3, "shares": "auto"},
    "growth": {"operator": "interpolate", "position": "upper", "init": "mean"},
}

_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Growth alone: it costs little quality, frozen layers cost much. Compact states save the memory instead.
    "parity": {
        **_GROWN_TWICE,
        "old_layers": {"policy": "trained"},
        "optimizer": {"states": "compact"},
        "schedule": _WSD_OVER_THE_RUN,
    },
    # Half of the old layers train at a time, and the others rest as bf16 weights alone.
    "lean": {
        **_GROWN_TWICE,
        "old_layers": {"policy": "rotate", "active_share": 0.5, "moments": "keep"},
        "optimizer": {"states": "smallest"},
        "schedule": _WSD_OVER_THE_RUN,
    },
    # STEP as published (Yano et al., NAACL 2025): old layers are frozen and get adapters.
    "paper": {
        "stages": {"count": 3, "grow_at": 0.75},
        "growth": {"operator": "interpolate", "position": "upper", "init": "mean"},
        "old_layers": {"policy": "adapters"},
        "adapter": {"at_stage_end": "merge"},
        "optimizer": {"states": "full"},
        "schedule": {"scope": "stage"},
    },
}


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values by key. Where the config has no value, the preset that `preset` names may give one.

    Raises ValueError if there is no such preset.
    """
    return merged(preset_values(values.get("preset"), values), values)


def preset_values(name: Any, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the values of a preset by section and key, without those that contradict the config's own `values`.

    Raises ValueError if there is no preset of that name. None names the empty preset.
    """
    if name is None:
        return {}
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(f"preset {in_short(name)} is unknown: choose one of {', '.join(get_args(Preset))}")
    preset = {section: dict(keys) for section, keys in _PRESETS[name].items()}
    own = values.get("stages")
    if isinstance(own, Mapping):
        given = {key for key, value in own.items() if value is not None}
        if "grow_at" in given or isinstance(own.get("steps"), list) or isinstance(own.get("tokens"), list):
            preset["stages"].pop("shares", None)
        if "shares" in given:
            preset["stages"].pop("grow_at", None)
    return preset


def preset_line(name: Preset, config: Any) -> str:
    """Return a line with every key of a preset and its value in `config`, and with the preset's where they differ."""
    shown = []
    for section, keys in _PRESETS[name].items():
        for key, value in keys.items():
            own = getattr(getattr(config, section), key)
            shown.append(f"{section}.{key} {own}" + ("" if own == value else f" (the preset: {value})"))
    return f"preset {name}: {', '.join(shown)}"

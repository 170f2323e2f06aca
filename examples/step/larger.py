"""What the demo's three ways of training would need for larger models, by the planner: no weight is built."""

from megatron_step import forecast, load_config

_WAYS = {
    "ordinary training": {"stages": {"count": 1}},
    "preset parity": {"preset": "parity"},
    "preset paper": {"preset": "paper", "stages": {"shares": "auto"}, "adapter": {"rank": 64, "alpha": 128}},
}
_MODELS = {
    "1.2B on 1 GPU": ("examples/paper/1.2b.yaml", 1, {"training": {"micro_batch_size": 1}}),
    "1.2B on 8 GPUs": ("examples/paper/1.2b.yaml", 8, {"training": {"micro_batch_size": 1}}),
    "7B on 8 GPUs, TP4 PP2": ("examples/scale/7b.yaml", 8, {"stages": {"count": 3}, "planner": {"cluster": None}}),
}

print(f"{'model':24}{'':20}{'model states':>16}{'peak memory':>16}{'operations':>12}   (of the fullest GPU)")
for model, (path, num_gpus, keys) in _MODELS.items():
    ordinary = None
    for way, changed in _WAYS.items():
        sections = {name: {**keys.get(name, {}), **values} for name, values in changed.items() if name != "preset"}
        config = load_config(path, **{**keys, **sections, "preset": changed.get("preset")})
        plan = forecast(config, num_gpus)
        states = max(rank.memory.model_state_bytes for stage in plan.stages for rank in stage.ranks)
        figures = (states, max(stage.peak_bytes for stage in plan.stages), plan.seconds)
        ordinary = ordinary or figures
        shares = [f"{figure / whole:.0%}" for figure, whole in zip(figures, ordinary)]
        gib = [f"{nbytes / 2**30:.1f} GiB ({share})" for nbytes, share in zip(figures, shares)]
        print(f"{model:24}{way:20}{gib[0]:>16}{gib[1]:>16}{shares[2]:>12}")

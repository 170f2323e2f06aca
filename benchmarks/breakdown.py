"""Time of a step by kind of operation, measured with torch's profiler."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "megatron_step::transpose"),
    "attention": ("megatron_step::attention",),
    "norms, rotary, SwiGLU": ("megatron_step::rms_norm", "megatron_step::split_qkv", "megatron_step::swiglu"),
    "loss beside its products": ("megatron_step::cross_entropy",),
    "AdamW, norm and clipping": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach_mul_"),
    "copies, sums and fills": (
        *("aten::copy_", "aten::add", "aten::fill_", "aten::zero_", "aten::mul", "aten::sum", "aten::index_select"),
        *("aten::_foreach", "aten::embedding", "c10d::"),
    ),
}
"""Kinds of operations by prefixes of their names; an operation belongs to the first kind that matches."""
REST = "all else (Python, autograd, allocation)"


def step_breakdown(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Share of each kind of operation in the time of `steps` calls of `step`; the shares add up to 1."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    seconds = dict.fromkeys([*PARTS, REST], 0.0)
    for event in profiler.key_averages():
        seconds[_part(event.key)] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def _part(operation: str) -> str:
    return next((part for part, names in PARTS.items() if operation.startswith(names)), REST)

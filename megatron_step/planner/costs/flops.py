"""Floating-point operations of training, by arithmetic.

A product of an [m, k] with a [k, n] matrix takes 2 m k n operations. A linear has three: forward, gradient of its
input, gradient of its weight; a frozen linear lacks the last one. The count has the products of the linears, of
adapters (6 r (k + n)), of attention over the causal half of the scores, and of the output layer (Narayanan et al.,
2021, appendix; their formula counts both halves). It leaves out recomputed products, which are no progress.
"""

from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.planner.costs.held import held_chunks


def stage_flops_per_token(resolved: ResolvedConfig, stage: Stage) -> int:
    """Return the floating-point operations of a training step of `stage` for one token of a full sequence."""
    chunks = [held for chunks in held_chunks(resolved, stage) for held in chunks]
    layers = sum(layer.flops_per_token for held in chunks for layer in held.layers.values())
    return layers + sum(held.outer.flops_per_token for held in chunks)

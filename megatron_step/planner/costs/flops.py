"""Floating-point operations of training, by arithmetic.

A product of an [m, k] with a [k, n] matrix takes 2 m k n operations. A linear has three: forward, gradient of its
input, gradient of its weight; a frozen linear lacks the last one. The count has the products of the linears, of
adapters (6 r (k + n)), of attention over the causal half of the scores, and of the output layer (Narayanan et al.,
2021, appendix; their formula counts both halves). It leaves out recomputed products, which are no progress.
"""

from collections.abc import Sequence

from megatron_step.config.run import RunConfig, consumed_samples
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage, StagePlan
from megatron_step.planner.costs.held import held_chunks


def stage_flops_per_token(resolved: ResolvedConfig, stage: Stage) -> int:
    """Return the floating-point operations of a training step of `stage` for one token of a full sequence."""
    chunks = [held for chunks in held_chunks(resolved, stage) for held in chunks]
    layers = sum(layer.flops_per_token for held in chunks for layer in held.layers.values())
    return layers + sum(held.outer.flops_per_token for held in chunks)


def run_flops(config: RunConfig, plan: StagePlan, flops_per_token: Sequence[int], steps: int) -> int:
    """Return the operations of the first `steps` steps of a run, with the `flops_per_token` of each stage."""

    def tokens(finished: int) -> int:
        return consumed_samples(config.training, finished) * config.model.seq_length

    begun = [stage for stage in plan.stages if stage.first_step < steps]
    return sum(
        flops_per_token[stage.index] * (tokens(min(steps, stage.last_step)) - tokens(stage.first_step))
        for stage in begun
    )

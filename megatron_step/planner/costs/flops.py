"""Floating-point operations of training, by arithmetic.

A product of an [m, k] with a [k, n] matrix takes 2 m k n operations. A linear has three: forward, gradient of its
input, gradient of its weight; a frozen linear lacks the last one. The count has the products of the linears, of
adapters (6 r (k + n)), of attention over the causal half of the scores, and of the output layer (Narayanan et al.,
2021, appendix; their formula counts both halves). It leaves out recomputed products, which are no progress.
"""

from megatron_step.plan.parameters import layer_handling
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.plan.trainable import treatment


def stage_flops_per_token(resolved: ResolvedConfig, stage: Stage) -> int:
    """Return the floating-point operations of a training step of `stage` for one token of a full sequence."""
    layers = sum(layer_flops_per_token(resolved, stage, layer) for layer in range(stage.num_layers))
    return layers + output_flops_per_token(resolved, stage)


def layer_flops_per_token(resolved: ResolvedConfig, stage: Stage, layer: int) -> int:
    """Return the operations of the layer with the number `layer`, from 0."""
    return resolved.blocks.layer.flops(layer_handling(resolved, stage, layer))


def output_flops_per_token(resolved: ResolvedConfig, stage: Stage) -> int:
    """Return the operations of the output layer."""
    head = resolved.blocks.head
    return head.flops(treatment(head.output_key, stage, resolved.config).trained)

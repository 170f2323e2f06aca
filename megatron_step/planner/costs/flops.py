"""Floating-point operations of training, by arithmetic.

A product of an [m, k] with a [k, n] matrix takes 2 m k n operations. A linear has three: forward, gradient of its
input, gradient of its weight, the last of which a frozen one has not. Counted are the products of the linears, of
adapters (6 r (k + n)), of attention over the causal half of the scores, and of the output layer (Narayanan et al.,
2021, appendix; their formula counts both halves). Recomputed ones are not: they are no progress.
"""

from megatron_step.config.run import RunConfig
from megatron_step.plan.blocks.head import head_of
from megatron_step.plan.blocks.layer import layer_blocks
from megatron_step.plan.parameters import layer_handling
from megatron_step.plan.stages import Stage
from megatron_step.plan.trainable import treatment


def stage_flops_per_token(config: RunConfig, stage: Stage, vocab_size: int) -> int:
    """Floating-point operations of a training step of `stage` for one token of a full sequence."""
    layers = sum(layer_flops_per_token(config, stage, layer) for layer in range(stage.num_layers))
    return layers + output_flops_per_token(config, stage, vocab_size)


def layer_flops_per_token(config: RunConfig, stage: Stage, layer: int) -> int:
    """Operations of the layer with the number `layer`, from 0."""
    return layer_blocks(config.model).flops(layer_handling(config, stage, layer))


def forward_flops_per_token(config: RunConfig) -> int:
    """Operations of a layer's forward pass, which full recompute does again; without adapters."""
    return layer_blocks(config.model).forward_flops()


def output_flops_per_token(config: RunConfig, stage: Stage, vocab_size: int) -> int:
    """Operations of the output layer."""
    head = head_of(config.model, vocab_size)
    return head.flops(vocab_size, treatment(head.output_key, stage, config).trained)

"""Floating-point operations of training, by arithmetic.

A product of an [m, k] with a [k, n] matrix takes 2 m k n operations. A linear has three: forward, gradient of its
input, gradient of its weight, the last of which a frozen one has not. Counted are the products of the linears, of
adapters (6 r (k + n)), of attention over the causal half of the scores, and of the output layer (Narayanan et al.,
2021, appendix; their formula counts both halves). Recomputed ones are not: they are no progress.
"""

from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.plan.names import layer_key
from megatron_step.plan.parameters import layer_linears
from megatron_step.plan.stages import Stage
from megatron_step.plan.trainable import has_adapters, treatment


def stage_flops_per_token(config: RunConfig, stage: Stage, vocab_size: int) -> int:
    """Floating-point operations of a training step of `stage` for one token of a full sequence."""
    layers = sum(layer_flops_per_token(config, stage, layer) for layer in range(stage.num_layers))
    return layers + output_flops_per_token(config, stage, vocab_size)


def layer_flops_per_token(config: RunConfig, stage: Stage, layer: int) -> int:
    """Those of the layer with the number `layer`, from 0."""
    adapted = config.adapter.targets if has_adapters(layer, stage, config) else []
    flops = 3 * _attention_flops(config.model)
    for target, linear in layer_linears(config.model).items():
        per_weight = _linear_flops(layer_key(layer, f"{linear.key}.weight"), stage, config)
        flops += per_weight * linear.inputs * linear.outputs
        if target in adapted:
            flops += 6 * config.adapter.rank * (linear.inputs + linear.outputs)
    return flops


def forward_flops_per_token(config: RunConfig) -> int:
    """Those of a layer's forward pass, which full recompute does again; without adapters."""
    products = sum(linear.inputs * linear.outputs for linear in layer_linears(config.model).values())
    return 2 * products + _attention_flops(config.model)


def output_flops_per_token(config: RunConfig, stage: Stage, vocab_size: int) -> int:
    """Those of the output layer."""
    key = "embedding." if config.model.tie_embeddings else "output_layer."
    return _linear_flops(key, stage, config) * config.model.hidden_size * vocab_size


def _linear_flops(key: str, stage: Stage, config: RunConfig) -> int:
    """Operations for each element of the weight `key`."""
    return 6 if treatment(key, stage, config).trained else 4


def _attention_flops(model: ModelConfig) -> int:
    """Of q k^T and of the scores times v, forward: a token sees half of the sequence on average."""
    return 2 * model.num_attention_heads * model.attention_head_size * (model.seq_length + 1)

"""Floating-point operations of training, by arithmetic."""

from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.planner.parameters import layer_linears
from megatron_step.planner.stages import Stage
from megatron_step.planner.trainable import has_adapters


def forward_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of the forward pass for one token of a full sequence.

    A product of an [m, k] with a [k, n] matrix takes 2 m k n operations. Counted are the matrix products of the
    linears, of attention over the causal half of the scores, and of the output layer (Narayanan et al., 2021, appendix;
    their formula counts both halves of the scores).
    """
    linears = sum(linear.inputs * linear.outputs for linear in layer_linears(model).values())
    output = model.hidden_size * vocab_size
    return 2 * (model.num_layers * linears + output) + model.num_layers * _attention_flops(model)


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Operations of the forward and backward pass for one token: the backward pass takes twice the forward's.

    Recomputed activations are not counted: they are no progress.
    """
    return 3 * forward_flops_per_token(model, vocab_size)


def stage_flops_per_token(config: RunConfig, stage: Stage, vocab_size: int) -> int:
    """Operations that a step of `stage` really takes for one token.

    A frozen linear has no weight gradient: two thirds of the usual 6 k n operations. An adapter of rank r adds
    6 r (k + n). A frozen output layer is counted alike; a frozen embedding has no products.
    """
    model = config.model
    output_trained = stage.index == 0 or not (
        config.freeze.embedding if model.tie_embeddings else config.freeze.output_layer
    )
    flops = (6 if output_trained else 4) * model.hidden_size * vocab_size
    for number, layer in enumerate(stage.layers):
        trained = layer.born == stage.index or not config.freeze.layers
        adapted = config.adapter.targets if has_adapters(number, stage, config) else []
        for target, linear in layer_linears(model).items():
            flops += (6 if trained else 4) * linear.inputs * linear.outputs
            if target in adapted:
                flops += 6 * config.adapter.rank * (linear.inputs + linear.outputs)
        flops += 3 * _attention_flops(model)
    return flops


def _attention_flops(model: ModelConfig) -> int:
    """Of q k^T and of the scores times v, forward: a token sees half of the sequence on average."""
    return 2 * model.num_attention_heads * model.attention_head_size * (model.seq_length + 1)

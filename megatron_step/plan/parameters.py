"""The weights of a rank: their keys in checkpoints, their shapes, and what a stage does with them.

Over t tensor-parallel ranks (Megatron-LM, Shoeybi et al., 2019), with r the rank of the adapters:

    linear          matrix [n, k]           adapter A [r, k]    adapter B [n, r]
    qkv, fc1        [n / t, k]  by rows     [r / t, k]          [n / t, r]
    proj, fc2       [n, k / t]  by columns  [r, k / t]          [n, r / t]

Embedding and output layer are split by rows, biases with the rows of their matrix; norms are whole on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import Target
from megatron_step.plan.stages import Stage
from megatron_step.plan.trainable import Treatment, has_adapters, treatment


@dataclass(frozen=True)
class Parameter:
    """A weight, or one rank's part of it."""

    key: str
    """Its name in checkpoints, of the whole weight."""
    shape: tuple[int, ...]
    """Its lengths on this rank."""
    treatment: Treatment
    """What the stage does with it."""

    @property
    def numel(self) -> int:
        """Its elements on this rank."""
        return prod(self.shape)


@dataclass(frozen=True)
class Linear:
    """One of the four linears of a layer, whole."""

    key: str
    """Its name below the layer's, in checkpoints."""
    outputs: int
    """Rows of its matrix."""
    inputs: int
    """Columns of its matrix."""
    column_parallel: bool
    """Whether its rows are split over tensor-parallel ranks; otherwise its columns are."""


def layer_linears(model: ModelConfig) -> dict[Target, Linear]:
    """The linears of a layer."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    heads = model.num_attention_heads * model.attention_head_size
    groups = model.query_groups * model.attention_head_size
    gates = 2 if model.mlp == "swiglu" else 1  # a gated MLP has the gate above the up projection, in one matrix
    return {
        "qkv": Linear("self_attention.linear_qkv", heads + 2 * groups, hidden, True),
        "proj": Linear("self_attention.linear_proj", hidden, heads, False),
        "fc1": Linear("mlp.linear_fc1", gates * ffn, hidden, True),
        "fc2": Linear("mlp.linear_fc2", hidden, ffn, False),
    }


def chunk_parameters(
    config: RunConfig, stage: Stage, vocab_size: int, pp_rank: int, vp_stage: int
) -> tuple[Parameter, ...]:
    """Weights of a pipeline rank's model chunk, in the order in which its modules hold them.

    `vocab_size` is the tokenizer's. With tied embeddings and more than one pipeline rank, the last chunk has a copy of
    the embedding.
    """
    parallel = config.parallel
    first = pp_rank == 0 and vp_stage == 0
    last = pp_rank == parallel.pipeline_parallel_size - 1 and vp_stage == parallel.virtual_pipeline_size - 1
    parameters: list[Parameter] = []
    if first:
        parameters.append(_embedding(config, stage, vocab_size))
    for layer in stage.layers_of_chunk(pp_rank, vp_stage, parallel):
        parameters += layer_parameters(config, stage, layer)
    if last:
        parameters += _head(config, stage, vocab_size, holds_embedding=first)
    return tuple(parameters)


def layer_parameters(config: RunConfig, stage: Stage, layer: int) -> list[Parameter]:
    """Weights of the layer with the number `layer`, from 0, on a tensor-parallel rank."""
    prefix = f"decoder.layers.{layer}."
    return [
        _parameter(prefix + name, shape, config, stage)
        for name, shape in _layer_shapes(config, has_adapters(layer, stage, config))
    ]


def outer_parameters(
    config: RunConfig, stage: Stage, vocab_size: int, *, first: bool = True, last: bool = True
) -> list[Parameter]:
    """Weights outside the layers, on a tensor-parallel rank: of the `first` chunk the embedding, of the `last` one the
    final norm and the output layer."""
    embedding = [_embedding(config, stage, vocab_size)] if first else []
    return embedding + (_head(config, stage, vocab_size, holds_embedding=first) if last else [])


def _embedding(config: RunConfig, stage: Stage, vocab_size: int) -> Parameter:
    return _parameter("embedding.word_embeddings.weight", _vocab_shape(config, vocab_size), config, stage)


def _head(config: RunConfig, stage: Stage, vocab_size: int, holds_embedding: bool) -> list[Parameter]:
    """The last norm and the output layer of a chunk that does or does not hold the embedding too."""
    parameters = [_parameter("decoder.final_layernorm.weight", (config.model.hidden_size,), config, stage)]
    if not config.model.tie_embeddings:
        parameters.append(_parameter("output_layer.weight", _vocab_shape(config, vocab_size), config, stage))
    elif not holds_embedding:
        parameters.append(_embedding(config, stage, vocab_size))
    return parameters


def _vocab_shape(config: RunConfig, vocab_size: int) -> tuple[int, int]:
    rows = config.model.padded_vocab_size(vocab_size) // config.parallel.tensor_parallel_size
    return rows, config.model.hidden_size


def _parameter(key: str, shape: tuple[int, ...], config: RunConfig, stage: Stage) -> Parameter:
    return Parameter(key, shape, treatment(key, stage, config))


def _layer_shapes(config: RunConfig, adapted: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names below the layer's, and shapes on a tensor-parallel rank, in the order of the layer's modules."""
    model = config.model
    linears = layer_linears(model)
    yield "self_attention.linear_qkv.layer_norm_weight", (model.hidden_size,)
    yield from _linear_shapes(config, "proj", linears["proj"], adapted)
    yield from _linear_shapes(config, "qkv", linears["qkv"], adapted)
    if model.qk_norm:
        yield "self_attention.q_layernorm.weight", (model.attention_head_size,)
        yield "self_attention.k_layernorm.weight", (model.attention_head_size,)
    yield "mlp.linear_fc1.layer_norm_weight", (model.hidden_size,)
    yield from _linear_shapes(config, "fc1", linears["fc1"], adapted)
    yield from _linear_shapes(config, "fc2", linears["fc2"], adapted)


def _linear_shapes(
    config: RunConfig, target: Target, linear: Linear, adapted: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    tensor, rank = config.parallel.tensor_parallel_size, config.adapter.rank
    if linear.column_parallel:
        outputs, inputs, a_rank, b_rank = linear.outputs // tensor, linear.inputs, rank // tensor, rank
    else:
        outputs, inputs, a_rank, b_rank = linear.outputs, linear.inputs // tensor, rank, rank // tensor
    yield f"{linear.key}.weight", (outputs, inputs)
    if target == "qkv" and config.model.qkv_bias:
        yield f"{linear.key}.bias", (outputs,)
    if adapted and target in config.adapter.targets:
        yield f"{linear.key}.adapter.linear_in.weight", (a_rank, inputs)
        yield f"{linear.key}.adapter.linear_out.weight", (outputs, b_rank)

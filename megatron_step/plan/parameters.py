"""The weights of a rank: their keys in checkpoints, their shapes, and what a stage does with them.

Shapes are those of the blocks (plan/blocks). Embedding and output layer are split by rows over tensor-parallel ranks,
biases with the rows of their matrix; norms are whole on every rank.
"""

from dataclasses import dataclass
from math import prod

from megatron_step.config.run import RunConfig
from megatron_step.config.stages import Target
from megatron_step.plan.blocks.embedding import embedding_of
from megatron_step.plan.blocks.head import head_of
from megatron_step.plan.blocks.layer import layer_blocks, layer_linears
from megatron_step.plan.blocks.linear import Handling
from megatron_step.plan.layout import Chunk
from megatron_step.plan.names import layer_key
from megatron_step.plan.old_layers import Treatment, adapter_targets
from megatron_step.plan.stages import Stage
from megatron_step.plan.trainable import treatment


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


def chunk_parameters(config: RunConfig, stage: Stage, vocab_size: int, chunk: Chunk) -> tuple[Parameter, ...]:
    """Weights of a model chunk, in the order in which its modules hold them.

    `vocab_size` is the tokenizer's. With tied embeddings and more than one pipeline rank, the last chunk has a copy of
    the embedding.
    """
    outer = outer_parameters(config, stage, vocab_size, first=chunk.is_first, last=chunk.is_last)
    inner = [parameter for layer in stage.layers_of(chunk) for parameter in layer_parameters(config, stage, layer)]
    return (*outer[: chunk.is_first], *inner, *outer[chunk.is_first :])


def layer_parameters(config: RunConfig, stage: Stage, layer: int) -> list[Parameter]:
    """Weights of the layer with the number `layer`, from 0, on a tensor-parallel rank."""
    weights = layer_blocks(config.model).weights(config.parallel.tensor_parallel_size, _ranks(config, stage, layer))
    return [_parameter(layer_key(layer, name), shape, config, stage) for name, shape in weights]


def layer_handling(config: RunConfig, stage: Stage, layer: int) -> dict[Target, Handling]:
    """What `stage` does with the linears of the layer with the number `layer`, from 0."""
    ranks, handling = _ranks(config, stage, layer), {}
    for target, linear in layer_blocks(config.model).linears().items():
        trained = treatment(layer_key(layer, f"{linear.key}.weight"), stage, config).trained
        handling[target] = Handling(trained, ranks[target], drops=config.adapter.dropout > 0)
    return handling


def outer_parameters(
    config: RunConfig, stage: Stage, vocab_size: int, *, first: bool = True, last: bool = True
) -> list[Parameter]:
    """Weights outside the layers, on a tensor-parallel rank: of the `first` chunk the embedding, of the `last` one the
    final norm and the output layer."""
    tensor = config.parallel.tensor_parallel_size
    weights = list(embedding_of(config.model, vocab_size).weights(tensor)) if first else []
    if last:
        weights += head_of(config.model, vocab_size).weights(tensor, holds_embedding=first)
    return [_parameter(key, shape, config, stage) for key, shape in weights]


def _parameter(key: str, shape: tuple[int, ...], config: RunConfig, stage: Stage) -> Parameter:
    return Parameter(key, shape, treatment(key, stage, config))


def _ranks(config: RunConfig, stage: Stage, layer: int) -> dict[Target, int]:
    """Ranks of the adapters on a layer's linears; 0 for none."""
    adapted = adapter_targets(layer, stage, config)
    return {target: config.adapter.rank if target in adapted else 0 for target in layer_linears(config.model)}

"""The weights that a stage puts on each rank: their keys in checkpoints, their shapes, and which are trained.

Shapes are those of the blocks (plan/blocks). Embedding and output layer are split by rows over tensor-parallel ranks,
biases with the rows of their matrix; norms are whole on every rank.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_step.config.run import RunConfig
from megatron_step.config.stages import Target
from megatron_step.plan.blocks.linear import Handling
from megatron_step.plan.layout import Chunk, rank_chunks
from megatron_step.plan.names import layer_key
from megatron_step.plan.old_layers import adapter_targets
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import Parameter
from megatron_step.plan.trainable import treatment


@dataclass(frozen=True)
class HeldChunk:
    """A model chunk of a pipeline rank, with what a stage puts on it."""

    chunk: Chunk
    """The chunk."""
    layers: dict[int, list[Parameter]]
    """The weights of each layer by its number, from 0, bottom up."""
    outer: list[Parameter]
    """The weights outside the layers: of the embedding, or of the final norm and the output layer, or of both."""

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All weights, in the order in which the chunk's modules hold them."""
        inner = [parameter for weights in self.layers.values() for parameter in weights]
        return (*self.outer[: self.chunk.is_first], *inner, *self.outer[self.chunk.is_first :])


def held_chunks(resolved: ResolvedConfig, stage: Stage) -> tuple[tuple[HeldChunk, ...], ...]:
    """Return the chunks of each pipeline rank, bottom up, as `stage` fills them."""
    parallel = resolved.config.parallel
    return tuple(
        tuple(_held_chunk(resolved, stage, chunk) for chunk in rank_chunks(parallel, pp_rank))
        for pp_rank in range(parallel.pipeline_parallel_size)
    )


def _held_chunk(resolved: ResolvedConfig, stage: Stage, chunk: Chunk) -> HeldChunk:
    return HeldChunk(
        chunk,
        layers={layer: layer_parameters(resolved, stage, layer) for layer in stage.layers_of(chunk)},
        outer=outer_parameters(resolved, stage, first=chunk.is_first, last=chunk.is_last),
    )


def layer_parameters(resolved: ResolvedConfig, stage: Stage, layer: int) -> list[Parameter]:
    """Return the weights of the layer with the number `layer`, from 0, on a tensor-parallel rank."""
    config = resolved.config
    weights = resolved.blocks.layer.weights(resolved.batch.tensor, _ranks(resolved, stage, layer))
    return [_parameter(layer_key(layer, name), shape, config, stage) for name, shape in weights]


def layer_handling(resolved: ResolvedConfig, stage: Stage, layer: int) -> dict[Target, Handling]:
    """Return what `stage` does with the linears of the layer with the number `layer`, from 0."""
    config, handling = resolved.config, {}
    ranks, dequantized = _ranks(resolved, stage, layer), resolved.recipe.frozen_matrix is not None
    for target, linear in resolved.blocks.layer.linears().items():
        trained = treatment(layer_key(layer, f"{linear.key}.weight"), stage, config).trained
        handling[target] = Handling(trained, ranks[target], config.adapter.dropout > 0, dequantized)
    return handling


def outer_parameters(
    resolved: ResolvedConfig, stage: Stage, *, first: bool = True, last: bool = True
) -> list[Parameter]:
    """Return the weights outside the layers, on a tensor-parallel rank.

    The `first` chunk has the embedding, the `last` one the final norm and the output layer. With tied embeddings and
    more than one pipeline rank, the last chunk has a copy of the embedding.
    """
    blocks, tensor = resolved.blocks, resolved.batch.tensor
    weights = list(blocks.embedding.weights(tensor)) if first else []
    if last:
        weights += blocks.head.weights(tensor, holds_embedding=first)
    return [_parameter(key, shape, resolved.config, stage) for key, shape in weights]


def _parameter(key: str, shape: tuple[int, ...], config: RunConfig, stage: Stage) -> Parameter:
    return Parameter(key, shape, treatment(key, stage, config))


def _ranks(resolved: ResolvedConfig, stage: Stage, layer: int) -> dict[Target, int]:
    """Return the ranks of the adapters on a layer's linears; 0 for none."""
    config = resolved.config
    adapted = adapter_targets(layer, stage, config)
    return {target: config.adapter.rank if target in adapted else 0 for target in resolved.blocks.layer.linears()}

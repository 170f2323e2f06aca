"""What a stage puts on a rank: its layers, and what a model chunk holds outside its layers, each with all its costs.

A layer or an end of a chunk is asked once. Its block (plan/blocks) counts weights, bytes of a micro-batch and
operations. The policy for old layers says which weights are trained, and the recipe (plan/states.py) how many bytes
they take.

Embedding and output layer are split by rows over tensor-parallel ranks, biases with the rows of their matrix; norms are
whole on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.linear import Handling
from megatron_step.plan.blocks.tape import Use, Weights
from megatron_step.plan.layout import Chunk, rank_chunks
from megatron_step.plan.names import EMBEDDING, layer_key
from megatron_step.plan.old_layers import adapter_targets
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import Parameter
from megatron_step.plan.trainable import treatment

WEIGHT_ALIGNMENT = 64
"""Elements at a multiple of which each trained weight begins, with the distributed optimizer."""


@dataclass(frozen=True)
class LayerCost:
    """Costs of a layer on any rank."""

    state_bytes: int
    """Model states of the layer."""
    use: Use
    """One micro-batch in it."""
    flops: int
    """Floating-point operations of a micro-batch on one tensor-parallel rank, with those that are recomputed."""
    exchanged_bytes: int
    """Bytes that a tensor-parallel rank sends for a micro-batch."""
    reduced_bytes: int
    """Bytes that a data-parallel rank sends in a step."""


@dataclass(frozen=True)
class HeldLayer:
    """A layer of a stage."""

    parameters: tuple[Parameter, ...]
    """Weights of the layer on a tensor-parallel rank, in the order of the modules."""
    cost: LayerCost
    """Costs of the layer."""
    flops_per_token: int
    """Operations of a training step for a token, on all tensor-parallel ranks, without those that are recomputed."""


@dataclass(frozen=True)
class ChunkEnds:
    """Bytes of one micro-batch in what a model chunk has beside its layers."""

    kept: int
    """Bytes kept from the forward to the backward pass: the output sent on, and what the embedding keeps."""
    under_top: int
    """Bytes added once the backward pass of the topmost block is over."""
    embedding_backward: int
    """Peak of the embedding's backward pass, with all bytes that are kept at that time."""
    head: Use | None
    """The final norm, the output layer and the loss, where the chunk holds them."""


@dataclass(frozen=True)
class HeldEnds:
    """What a model chunk holds outside its layers: the embedding, the final norm and the output layer, or nothing."""

    parameters: tuple[Parameter, ...]
    """The weights on a tensor-parallel rank. With tied embeddings and more than one pipeline rank, the last chunk has a
    copy of the embedding."""
    state_bytes: int
    """Their model states."""
    reduced_bytes: int
    """Bytes that a data-parallel rank sends in a step."""
    ends: ChunkEnds
    """One micro-batch in it."""
    flops_per_token: int
    """Operations of the output layer in a training step for a token, on all tensor-parallel ranks."""


@dataclass(frozen=True)
class HeldChunk:
    """A model chunk of a pipeline rank, with what a stage puts on it."""

    chunk: Chunk
    """The chunk."""
    layers: dict[int, HeldLayer]
    """Each layer by its number, from 0, bottom up."""
    outer: HeldEnds
    """Embedding, final norm and output layer, if the chunk holds them."""

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All weights, in the order in which the chunk's modules hold them."""
        inner = [parameter for layer in self.layers.values() for parameter in layer.parameters]
        outer = self.outer.parameters
        return (*outer[: self.chunk.is_first], *inner, *outer[self.chunk.is_first :])


def held_chunks(resolved: ResolvedConfig, stage: Stage, turn: int = 0) -> tuple[tuple[HeldChunk, ...], ...]:
    """Return the chunks of each pipeline rank, bottom up, as `stage` fills them after `turn` changes of old layers."""
    parallel = resolved.config.parallel
    return tuple(
        tuple(_held_chunk(resolved, stage, chunk, turn) for chunk in rank_chunks(parallel, pp_rank))
        for pp_rank in range(parallel.pipeline_parallel_size)
    )


def _held_chunk(resolved: ResolvedConfig, stage: Stage, chunk: Chunk, turn: int) -> HeldChunk:
    layers = {layer: held_layer(resolved, stage, layer, turn) for layer in stage.layers_of(chunk)}
    return HeldChunk(chunk, layers, held_ends(resolved, stage, chunk))


def held_parts(
    resolved: ResolvedConfig, stage: Stage
) -> tuple[tuple[HeldLayer, ...], tuple[tuple[HeldEnds, ...], ...]]:
    """Return each layer of `stage`, and what the chunks of each pipeline rank hold outside the layers."""
    parallel = resolved.config.parallel
    layers = tuple(held_layer(resolved, stage, layer) for layer in range(stage.num_layers))
    ranks = [rank_chunks(parallel, pp_rank) for pp_rank in range(parallel.pipeline_parallel_size)]
    return layers, tuple(tuple(held_ends(resolved, stage, chunk) for chunk in chunks) for chunks in ranks)


def held_layer(resolved: ResolvedConfig, stage: Stage, layer: int, turn: int = 0) -> HeldLayer:
    """Return the layer with the number `layer`, from 0, of `stage` after `turn` changes of old layers."""
    batch, recompute = resolved.batch, resolved.config.parallel.recompute
    costs = resolved.blocks.layer.costs(batch, _handling(resolved, stage, layer, turn), resolved.core, recompute)
    weights = tuple((layer_key(layer, name), shape) for name, shape in costs.weights)
    parameters = _parameters(resolved, stage, weights, turn)
    cost = LayerCost(
        state_bytes=_state_bytes(resolved, parameters),
        use=costs.use,
        flops=(costs.flops + costs.recomputed_flops) * batch.tokens // batch.tensor,
        exchanged_bytes=costs.exchanged_bytes,
        reduced_bytes=_reduced_bytes(resolved, parameters),
    )
    return HeldLayer(parameters, cost, costs.flops)


def _handling(resolved: ResolvedConfig, stage: Stage, layer: int, turn: int) -> dict[Target, Handling]:
    """Return what `stage` does with the linears of a layer."""
    config, handling = resolved.config, {}
    adapted, dequantized = adapter_targets(layer, stage, config), resolved.recipe.frozen_matrix is not None
    for target, linear in resolved.blocks.layer.linears().items():
        trained = treatment(layer_key(layer, f"{linear.key}.weight"), stage, config, turn).trained
        rank = config.adapter.rank if target in adapted else 0
        handling[target] = Handling(trained, rank, config.adapter.dropout > 0, dequantized)
    return handling


def held_ends(resolved: ResolvedConfig, stage: Stage, chunk: Chunk) -> HeldEnds:
    """Return what `stage` puts on a chunk outside its layers."""
    config, batch, blocks = resolved.config, resolved.batch, resolved.blocks
    first, last = chunk.is_first, chunk.is_last
    embedding = blocks.embedding.costs(batch)
    embedding_trained = treatment(EMBEDDING, stage, config).trained
    output_trained = treatment(blocks.head.output_key, stage, config).trained
    head = blocks.head.costs(batch, trained=output_trained, holds_embedding=first) if last else None
    weights = (*(embedding.weights if first else ()), *(head.weights if head else ()))
    parameters = _parameters(resolved, stage, weights)
    # Another rank's chunk has this chunk's output until its gradient comes back, which stays to the end as well.
    sent = 0 if last else blocks.layer.stream(batch)
    # The output layer's gradient of a tied weight waits for the embedding's gradient; then their sum is there, too.
    waits = first and last and blocks.head.tied and embedding_trained
    waiting = embedding.gradient if waits else 0
    ends = ChunkEnds(
        kept=sent + (embedding.kept if first else 0),
        under_top=waiting + sent,
        embedding_backward=2 * sent + 2 * waiting + embedding.backward if first and embedding_trained else 0,
        head=head.use if head else None,
    )
    return HeldEnds(
        parameters=parameters,
        state_bytes=_state_bytes(resolved, parameters),
        reduced_bytes=_reduced_bytes(resolved, parameters),
        ends=ends,
        flops_per_token=head.flops if head else 0,
    )


def _parameters(resolved: ResolvedConfig, stage: Stage, weights: Weights, turn: int = 0) -> tuple[Parameter, ...]:
    return tuple(Parameter(key, shape, treatment(key, stage, resolved.config, turn)) for key, shape in weights)


def _state_bytes(resolved: ResolvedConfig, parameters: Sequence[Parameter]) -> int:
    """Return the model states of one data-parallel rank, with the padding of single weights, rounded up."""
    recipe, distributed = resolved.recipe, resolved.config.parallel.distributed_optimizer
    align = WEIGHT_ALIGNMENT if distributed else 1
    frozen_bytes = sum(recipe.frozen_bytes(parameter) for parameter in parameters if not parameter.treatment.trained)
    trained = [parameter for parameter in parameters if parameter.treatment.trained]
    padded = sum(-(-parameter.numel // align) * align for parameter in trained)
    optimizer_bytes = sum(recipe.optimizer_bytes(parameter.key, parameter.shape) for parameter in trained)
    states = Fraction(optimizer_bytes, resolved.dp_size if distributed else 1)
    return ceil(frozen_bytes + recipe.trained_bytes(padded) + states)


def _reduced_bytes(resolved: ResolvedConfig, parameters: Sequence[Parameter]) -> int:
    """Return what a data-parallel rank sends in a step.

    A ring sends (d - 1) / d of the gradients to sum them, and as much again to hand out sums or updated weights.
    """
    recipe, dp_size = resolved.recipe, resolved.dp_size
    handed_out = recipe.weight if resolved.config.parallel.distributed_optimizer else recipe.gradient
    trained = sum(parameter.numel for parameter in parameters if parameter.treatment.trained)
    return (recipe.gradient.bytes(trained) + handed_out.bytes(trained)) * (dp_size - 1) // dp_size

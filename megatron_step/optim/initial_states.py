"""Zero optimizer states of the weights that a rank owns, before the first step, and the matrices that Muon trains."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_step.config.model import ModelConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import Sharded, sharded_weights
from megatron_step.optim.compact import CompactAdamW
from megatron_step.optim.muon import Muon, Part, matrix_parts
from megatron_step.optim.owned import Owned, owned
from megatron_step.optim.pieces import Piece, owned_pieces
from megatron_step.optim.shared_blocks import SharedBlocks
from megatron_step.optim.slices import pieces
from megatron_step.plan.matrices import logical_matrices, rule_of
from megatron_step.plan.states import BF16, FIRST_MOMENT, Recipe


def make_states(
    optimizer: MegatronOptimizer,
    chunks: Sequence[DistributedDataParallel],
    model: ModelConfig,
    momentum: float,
    recipe: Recipe,
    parallel: Parallel,
    seed: int,
) -> None:
    """Allocate zero states by `recipe` of all that this rank owns of the chunks' trained weights.

    Muon, by the recipe's rule, gets its matrices of `model` with the decay `momentum`. `seed` is that of stochastic
    rounding.
    """
    held = list(_owned_weights(optimizer, chunks, parallel))
    parts = [part for shard, own in held for part in _parts(shard, own, model, recipe)]
    for part in inner_parts(optimizer):
        if recipe.is_compact:
            _allocate_compact(part.optimizer, held, parts, recipe, parallel, seed)
        else:
            for weight in dict.fromkeys(one.weight for one in parts):
                part.optimizer.state[weight] = {FIRST_MOMENT: torch.zeros_like(weight)}
            part.init_state_fn(part.optimizer, part.config)
        if recipe.rule == "muon":
            part.optimizer.muon = _muon(parts, momentum, recipe, parallel, seed)


def inner_parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """Yield the optimizers that have weights on this rank; without experts there is at most one."""
    return (part for part in optimizer.chained_optimizers if not part.is_stub_optimizer)


def _owned_weights(
    optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], parallel: Parallel
) -> Iterator[tuple[Sharded, Owned]]:
    for shard in sharded_weights(chunks, parallel).values():
        own = owned(optimizer, shard.data) if shard.data.requires_grad else None
        if own is not None:
            yield shard, own


def _parts(shard: Sharded, own: Owned, model: ModelConfig, recipe: Recipe) -> Iterator[Part]:
    """Yield this rank's parts of the matrices of a weight, if Muon trains it."""
    if rule_of(shard.key, shard.data.shape, recipe.rule) == "muon":
        rows, columns = pieces(shard)[0].global_shape
        matrices = logical_matrices(shard.key, rows, columns, model)
        yield from matrix_parts(own.updated, list(owned_pieces(shard, own.elements)), matrices)


def _allocate_compact(
    inner: CompactAdamW,
    held: Sequence[tuple[Sharded, Owned]],
    parts: Sequence[Part],
    recipe: Recipe,
    parallel: Parallel,
    seed: int,
) -> None:
    updated: list[Piece] = [part.piece for part in parts]
    for shard, own in held:
        weight_pieces = list(owned_pieces(shard, own.elements))
        inner.own(own.updated, weight_pieces, recipe.optimizer_states(shard.key, shard.data.shape))
        if rule_of(shard.key, shard.data.shape, recipe.rule) == "adamw":
            updated += weight_pieces
    has_scales = recipe.first_moment.scale_block is not None
    inner.share(SharedBlocks(updated if has_scales else [], parallel), seed)


def _muon(parts: Sequence[Part], momentum: float, recipe: Recipe, parallel: Parallel, seed: int) -> Muon:
    # Without the distributed optimizer each data-parallel rank updates all weights, and needs no other rank for it.
    group = parallel.groups.tp_dp_cp if parallel.config.distributed_optimizer else parallel.groups.tp
    narrow = recipe.weight == BF16 and parallel.device.type == "cuda"
    dtype = torch.bfloat16 if narrow else torch.float32
    return Muon(parts, momentum, seed, group, dtype, parallel.device)

"""Weights and optimizer states as megatron-core's sharded tensors, under one key for each tensor of each layer.

    decoder.layers.<global number>.<name>                       a weight
    optimizer.state.exp_avg.<weight's key>                      Adam's first moment or Muon's momentum, fp32 or codes
    optimizer.state.exp_avg_sq.<weight's key>                   Adam's second moment, fp32 or 8-bit codes
    optimizer.state.exp_avg_scale.<weight's key>                scales of codes [rows, blocks], bf16; exp_avg_sq_scale
    optimizer.state.param.<weight's key>                        fp32 main weight, where the weight itself is bf16
    optimizer.state.remainder.<weight's key>                    or the 16 bits that the bf16 weight lacks (int16)
    optimizer.state.correction.<weight's key>                   or 8 of them (int8)

Keys and shapes do not depend on the layout or on whether the optimizer is distributed. So every layout can load the
checkpoint of any other layout.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_step.checkpoint.scales import scale_tensors
from megatron_step.model.build import Sharded
from megatron_step.optim.decoded import keeps_ties
from megatron_step.optim.owned import Held, held, owned
from megatron_step.optim.slices import pieces, rectangles
from megatron_step.plan.states import CORRECTION, MAIN_WEIGHT, REMAINDER, SCALE_SUFFIX, SECOND_MOMENT, Recipe


def in_pieces(shards: Mapping[str, Sharded]) -> dict[str, ShardedTensor]:
    """Return the tensors as they are saved: a fused weight as its parts. The data are views of the live tensors."""
    return {f"{name}/{part.global_offset}": part for name, shard in shards.items() for part in pieces(shard)}


def sharded_optimizer_states(
    optimizer: MegatronOptimizer, weights: Mapping[str, Sharded], recipe: Recipe, *, saving: bool = False
) -> dict[str, ShardedTensor]:
    """Return the states by `recipe` that this rank holds of trained and resting weights: live tensors, to save or to
    load into.

    With the distributed optimizer each data-parallel rank has its own slices, as rectangles of the weights' shapes. A
    block of 8-bit moments that ranks share is loaded by all of them, and with `saving` saved by the one that has its
    first element.
    """
    tensors: dict[str, ShardedTensor] = {}
    for shard in weights.values():
        own = held(optimizer, shard.data)
        if own is not None:
            tensors |= state_tensors(shard, own, own.states, recipe, saving=saving)
    return tensors


def state_tensors(
    shard: Sharded, own: Held, states: Mapping[str, Tensor], recipe: Recipe, *, saving: bool = False
) -> dict[str, ShardedTensor]:
    """Return `states` by `recipe`, flat and by name, of the elements that this rank owns of a weight, as rectangles."""
    tensors: dict[str, ShardedTensor] = {}
    for name, format in recipe.optimizer_states(shard.key, shard.data.shape).items():
        parts = list(rectangles(shard, own.elements, states[name], own.is_replicated))
        tensors |= _by_key(f"optimizer.state.{name}.", parts)
        if format.scale_block:
            scales = scale_tensors(parts, states[name + SCALE_SUFFIX], saving)
            tensors |= _by_key(f"optimizer.state.{name}{SCALE_SUFFIX}.", scales)
    return tensors


def _by_key(prefix: str, tensors: Iterable[ShardedTensor]) -> dict[str, ShardedTensor]:
    """The tensors under their keys with a prefix, by key and place."""
    named = (replace(tensor, key=prefix + tensor.key) for tensor in tensors)
    return {f"{tensor.key}/{tensor.global_offset}": tensor for tensor in named}


def reset_main_weights(optimizer: MegatronOptimizer, weights: Mapping[str, Sharded]) -> None:
    """Set the main weights of `weights` to what the weights are now."""
    for shard in weights.values():
        own = owned(optimizer, shard.data)
        if own is None:
            continue
        if MAIN_WEIGHT in own.states:
            own.states[MAIN_WEIGHT].copy_(shard.data.detach().flatten()[own.elements])
        for name in (REMAINDER, CORRECTION):
            if name in own.states:
                own.states[name].zero_()
        if keeps_ties(own.states):
            own.states[SECOND_MOMENT].abs_()  # the sign is a part of the main weight

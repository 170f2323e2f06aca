"""Weights and optimizer states as megatron-core's sharded tensors, under one key for each tensor of each layer.

    decoder.layers.<global number>.<name>                       a weight
    optimizer.state.exp_avg.<weight's key>                      Adam's first moment, fp32
    optimizer.state.exp_avg_sq.<weight's key>                   Adam's second moment, fp32
    optimizer.state.param.<weight's key>                        fp32 main weight, where the weight itself is bf16

Keys and shapes do not depend on the layout, nor on whether the optimizer is distributed: any layout loads any other's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_step.engine.compat.optimizers import owned_slice, owned_states
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import sharded_state
from megatron_step.optim.slices import pieces, rectangles
from megatron_step.plan.states import MAIN_WEIGHT, MOMENTS, Recipe

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


def sharded_weights(chunks: Sequence[torch.nn.Module], parallel: Parallel) -> dict[str, Sharded]:
    """Every weight of this rank's chunks, wrapped for data parallelism or not; the tensors are the live parameters."""
    modules = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in chunks]
    return {
        f"{index}.{name}": shard
        for index, module in enumerate(modules)
        for name, shard in sharded_state(module, parallel).items()
        if isinstance(shard, Sharded)
    }


def in_pieces(shards: Mapping[str, Sharded]) -> dict[str, ShardedTensor]:
    """The tensors as they are saved, a fused weight in its parts; their data are views of the live tensors."""
    return {f"{name}/{part.global_offset}": part for name, shard in shards.items() for part in pieces(shard)}


def sharded_optimizer_states(
    optimizer: MegatronOptimizer, weights: Mapping[str, Sharded], recipe: Recipe
) -> dict[str, ShardedTensor]:
    """The states by `recipe` that this rank holds of trainable weights, live, to be saved, or loaded in place.

    With the distributed optimizer each data-parallel rank has its own slices, as rectangles of the weights' shapes.
    """
    states: dict[str, ShardedTensor] = {}
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for shard, param in _trainable(weights):
            for name in recipe.optimizer_states(param.shape):
                for piece in _state_pieces(part, shard, param, name):
                    states[f"{piece.key}/{piece.global_offset}"] = piece
    return states


def _state_pieces(part: MegatronOptimizer, shard: Sharded, param: Tensor, name: str) -> Iterator[ShardedTensor]:
    """What this rank holds of one state of a weight."""
    prefix = f"optimizer.state.{name}"
    if not isinstance(part, DistributedOptimizer):
        ((_, state),) = _states(part, param, [name])
        yield from pieces(make_sharded_optimizer_tensor(shard, state, prefix))
    elif param in part.model_param_group_index_map:
        for piece in rectangles(shard, owned_slice(part, param), owned_states(part, param)[name]):
            yield replace(piece, key=f"{prefix}.{piece.key}")


def set_optimizer_state(
    optimizer: MegatronOptimizer, weights: dict[str, Sharded], name: str, states: dict[str, Tensor]
) -> None:
    """Copy states of whole weights, by the keys of `weights`, to where the optimizer keeps them on this rank."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for key, tensor in states.items():
            param = weights[key].data
            if isinstance(part, DistributedOptimizer):
                _set_slice(part, param, name, tensor)
            else:
                ((_, own),) = _states(part, param, [name])
                own.copy_(tensor)


def _set_slice(part: DistributedOptimizer, param: Tensor, name: str, tensor: Tensor) -> None:
    """Copy the slice of a state that this data-parallel rank owns, if it owns one."""
    if param not in part.model_param_group_index_map:
        return
    owned_states(part, param)[name].copy_(tensor.flatten()[owned_slice(part, param)])


def own_states(optimizer: MegatronOptimizer, param: Tensor) -> dict[str, Tensor]:
    """Return this rank's part of a trained weight's optimizer states, live, by name; empty if it holds none."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        if not isinstance(part, DistributedOptimizer):
            return dict(_states(part, param, MOMENTS))
        if param in part.model_param_group_index_map:
            return owned_states(part, param)
    return {}


def _trainable(weights: Mapping[str, Sharded]) -> Iterator[tuple[Sharded, Tensor]]:
    return ((shard, shard.data) for shard in weights.values() if shard.data.requires_grad)


def _states(part: MegatronOptimizer, param: Tensor, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The named states of one parameter of an optimizer that is not distributed."""
    main = getattr(param, "main_param", param)
    for name in names:
        yield name, main if name == MAIN_WEIGHT else part.optimizer.state[main][name]

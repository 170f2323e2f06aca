"""Weights and optimizer states as megatron-core's sharded tensors, under one key for each tensor of each layer.

    decoder.layers.<global number>.<name>                       a weight
    optimizer.state.exp_avg.<weight's key>                      Adam's first moment, fp32
    optimizer.state.exp_avg_sq.<weight's key>                   Adam's second moment, fp32
    optimizer.state.param.<weight's key>                        fp32 main weight, where the weight itself is bf16

Keys and shapes do not depend on the layout, nor on whether the optimizer is distributed: any layout loads any other's.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_step.engine.compat.optimizers import owned_slice, owned_states
from megatron_step.engine.formats import tensor_type
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import sharded_state
from megatron_step.plan.states import MAIN_WEIGHT, MOMENTS, RECIPES, SAVED_STATE

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


def state_names(precision: str) -> tuple[str, ...]:
    """Names of the optimizer states that a checkpoint holds for each trainable weight."""
    return RECIPES[precision].optimizer_states


def sharded_optimizer_states(
    optimizer: MegatronOptimizer, weights: dict[str, Sharded], precision: str
) -> dict[str, Sharded]:
    """Every optimizer state for saving. With the distributed optimizer they are gathered to data-parallel rank 0."""
    states: dict[str, Sharded] = {}
    names = state_names(precision)
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        if isinstance(part, DistributedOptimizer):
            metadata = {"distrib_optim_fully_reshardable_mem_efficient": True}
            gathered = part.sharded_param_state_fully_reshardable(weights, metadata=metadata)
            for tensors in (gathered or {}).values():
                states.update({tensors[name].key: tensors[name] for name in names})
        else:
            for shard, param in _trainable(weights):
                for name, tensor in _states(part, param, names):
                    sharded = make_sharded_optimizer_tensor(shard, tensor, prefix=f"optimizer.state.{name}")
                    states[sharded.key] = sharded
    return states


def optimizer_state_requests(weights: dict[str, Sharded], name: str) -> dict[str, Sharded]:
    """Room on the CPU for one state of every trainable weight, whole over data-parallel ranks, to load into."""
    return {
        key: make_sharded_optimizer_tensor(
            shard, torch.empty(param.shape, dtype=tensor_type(SAVED_STATE)), prefix=f"optimizer.state.{name}"
        )
        for key, shard in weights.items()
        for param in [shard.data]
        if param.requires_grad
    }


def set_optimizer_state(
    optimizer: MegatronOptimizer, weights: dict[str, Sharded], name: str, loaded: dict[str, Tensor]
) -> None:
    """Copy loaded states, by the keys of `optimizer_state_requests`, to where the optimizer keeps them on this rank."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for key, tensor in loaded.items():
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


def _trainable(weights: dict[str, Sharded]) -> Iterator[tuple[Sharded, Tensor]]:
    return ((shard, shard.data) for shard in weights.values() if shard.data.requires_grad)


def _states(part: MegatronOptimizer, param: Tensor, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The named states of one parameter of an optimizer that is not distributed."""
    main = getattr(param, "main_param", param)
    for name in names:
        yield name, main if name == MAIN_WEIGHT else part.optimizer.state[main][name]

"""Puts adapters on the linears of layers, in place: the names of the base weights stay as they are."""

from collections.abc import Callable, Collection, Iterable

import torch
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_step.config.model import ModelConfig
from megatron_step.config.stages import AdapterConfig, Target
from megatron_step.engine.parallel import Parallel
from megatron_step.layers.adapter import AdaptableLinear, Adapter
from megatron_step.layers.te_adapter import make_adaptable
from megatron_step.model.build import sharded_state
from megatron_step.model.gpt import GPTModel
from megatron_step.model.initialize import initialize
from megatron_step.plan.names import is_adapter
from megatron_step.plan.resolved import layer_blocks


def attach_adapters(
    chunk: GPTModel | Float16Module,
    model: ModelConfig,
    config: AdapterConfig,
    targets: Callable[[int], Collection[Target]],
    parallel: Parallel,
    seed: int,
) -> None:
    """Put fresh adapters on the linears `targets(number)` of each of the chunk's layers, in place.

    A fresh adapter changes nothing: its B is zero. Layers are numbered bottom up over the whole model, from 0. Rank,
    alpha and dropout are those of `config`.

    Raises ValueError if the rank cannot be split over the tensor-parallel ranks.
    """
    linears = layer_blocks(model).linears()
    for number, layer in numbered_layers(chunk):
        wanted = targets(number)
        for site, (target, place) in enumerate(linears.items()):
            if target not in wanted:
                continue
            linear = make_adaptable(layer.get_submodule(place.key), parallel.config.sequence_parallel)
            linear.adapter = Adapter(
                linear.split,
                linear.weight,
                rank=config.rank,
                alpha=config.alpha,
                dropout=config.dropout,
                site=number * len(linears) + site,
                group=parallel.groups.tp,
            )
    initialize_adapters(chunk, model, parallel, seed)


def initialize_adapters(chunk: GPTModel | Float16Module, model: ModelConfig, parallel: Parallel, seed: int) -> None:
    """Initialize the chunk's adapters, in place: B is zero, A is drawn from `seed`, the same in every layout."""
    shards = sharded_state(chunk, parallel)
    initialize({name: shard for name, shard in shards.items() if is_adapter(name)}, model, seed)


def adapted_linears(chunk: MegatronModule) -> Iterable[AdaptableLinear]:
    """The chunk's linears that have an adapter."""
    return (module for module in chunk.modules() if getattr(module, "adapter", None) is not None)


def numbered_layers(chunk: MegatronModule) -> Iterable[tuple[int, torch.nn.Module]]:
    """The chunk's layers with their numbers in the whole model, from 0."""
    model = chunk.module if isinstance(chunk, Float16Module) else chunk
    return ((layer.layer_number - 1, layer) for layer in model.decoder.layers)

"""Puts adapters on the linears of layers, in place: the names of the base weights stay as they are."""

from collections.abc import Callable, Iterable

import torch
from megatron.core.transformer.module import Float16Module

from megatron_step.config.model import ModelConfig
from megatron_step.config.stages import AdapterConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.layers.adapter import Adapter
from megatron_step.layers.te_adapter import make_adaptable
from megatron_step.model.build import sharded_state
from megatron_step.model.gpt import GPTModel
from megatron_step.model.initialize import initialize

TARGETS: dict[str, str] = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
"""Where in a layer each target's linear is."""


def attach_adapters(
    chunk: GPTModel | Float16Module,
    model: ModelConfig,
    config: AdapterConfig,
    adapted: Callable[[int], bool],
    parallel: Parallel,
    seed: int,
) -> None:
    """Give the target linears of the chunk's layers for which `adapted(number)` holds fresh adapters, in place.

    A fresh adapter changes nothing: its B is zero. Layers are numbered bottom up over the whole model, from 0.

    Raises ValueError if the rank cannot be split over the tensor-parallel ranks.
    """
    for number, layer in numbered_layers(chunk):
        for site, target in enumerate(TARGETS):
            if target not in config.targets or not adapted(number):
                continue
            linear = make_adaptable(layer.get_submodule(TARGETS[target]), parallel.config.sequence_parallel)
            linear.adapter = Adapter(
                linear.split,
                linear.weight,
                rank=config.rank,
                alpha=config.alpha,
                dropout=config.dropout,
                site=number * len(TARGETS) + site,
                group=parallel.groups.tp,
                gated=target == "fc1" and model.mlp == "swiglu",
            )
    initialize_adapters(chunk, model, parallel, seed)


def initialize_adapters(chunk: GPTModel | Float16Module, model: ModelConfig, parallel: Parallel, seed: int) -> None:
    """Fill the chunk's adapters as fresh ones, in place; A is drawn from `seed`, alike in every layout."""
    shards = sharded_state(chunk, parallel)
    initialize({key: shard for key, shard in shards.items() if ".adapter." in key}, model, seed)


def adapted_linears(chunk: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """The chunk's linears that have an adapter."""
    return (module for module in chunk.modules() if getattr(module, "adapter", None) is not None)


def numbered_layers(chunk: torch.nn.Module) -> Iterable[tuple[int, torch.nn.Module]]:
    """The chunk's layers with their numbers in the whole model, from 0."""
    model = chunk.module if isinstance(chunk, Float16Module) else chunk
    return ((layer.layer_number - 1, layer) for layer in model.decoder.layers)

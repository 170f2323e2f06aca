"""Grow a checkpoint's weights into the model of the next stage. Both may have any layout.

Layers are identified by their numbers in the plan, never by their place on a rank. The plan names the sources S of
layer j of the new stage. In fp32, rounded once:

    W_j = mean over i in S of (W_i + s B_i A_i)      a new layer, or an old one whose adapters are merged
    W_j = W_i,  A_j = A_i,  B_j = B_i                an old layer whose adapters are kept

A new layer without sources keeps its random weights; `identity` sets its two output projections to zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_step.adapters.merge import add_product
from megatron_step.checkpoint.load import FoundCheckpoint, load_tensors
from megatron_step.checkpoint.manifest import Manifest
from megatron_step.checkpoint.sharding import in_pieces
from megatron_step.config.stages import GrowthConfig
from megatron_step.engine.formats import decode
from megatron_step.engine.parallel import Parallel
from megatron_step.growth.turns import turns
from megatron_step.model.build import Sharded, sharded_weights
from megatron_step.plan.layout import num_chunks
from megatron_step.plan.names import factor_keys, in_layer, is_adapter, writes_residual
from megatron_step.plan.operators import INITS, first_layers
from megatron_step.plan.stages import Stage, even_layout, plan_from_dict


@dataclass(frozen=True)
class GrowthSource:
    """A checkpoint to grow from."""

    path: Path
    """The checkpoint's folder."""
    scaling: float
    """alpha / rank of the checkpoint's adapters."""
    tensors: Mapping[str, Sequence[int]]
    """Shape of every tensor in the checkpoint, by key."""


def growth_source(found: FoundCheckpoint) -> GrowthSource:
    """Return what growth needs to know about a checkpoint."""
    metadata = dist_checkpointing.load_tensors_metadata(str(found.path))
    return GrowthSource(
        found.path,
        adapter_scaling(found.manifest),
        {key: tuple(tensor.global_shape) for key, tensor in metadata.items()},
    )


def adapter_scaling(manifest: Manifest) -> float:
    """Return alpha / rank of a checkpoint's adapters; 0 if its run has none."""
    adapter = manifest.config["adapter"]
    return adapter["alpha"] / adapter["rank"] if adapter["rank"] else 0.0


def grow_weights(
    chunks: list[torch.nn.Module],
    source: GrowthSource,
    stage: Stage,
    growth: GrowthConfig,
    keep_adapters: bool,
    parallel: Parallel,
) -> None:
    """Fill the chunks, the model of `stage`, with the grown weights of `source`, in place. Every rank must call it.

    One layer is read at a time, so little is in memory beside the new model. Adapters that are not kept stay fresh.

    Raises ValueError if the checkpoint lacks a tensor that the model needs, or has it in another shape.
    """
    parts = turns(sharded_weights(chunks, parallel), stage, parallel)
    _, outside_layers = next(parts)
    load_tensors(source.path, in_pieces(outside_layers), shared=True)
    for layer, shards in parts:
        _grow_layer(list(shards.values()), layer, source, stage, growth, keep_adapters)


def load_merged(chunks: list[torch.nn.Module], found: FoundCheckpoint, parallel: Parallel) -> None:
    """Fill a model without adapters, of the checkpoint's depth, with the checkpoint's weights and merged adapters.

    Raises ValueError if the checkpoint lacks a tensor that the model needs, or has it in another shape.
    """
    stage = saved_stage(found.manifest)
    whole = replace(
        stage,
        index=0,
        layers=first_layers(stage.num_layers, True),
        layout=even_layout(stage.num_layers, num_chunks(parallel.config)),
    )
    grow_weights(chunks, growth_source(found), whole, GrowthConfig(), False, parallel)


def saved_stage(manifest: Manifest) -> Stage:
    """Return the stage whose model a checkpoint holds."""
    return plan_from_dict(manifest.plan).stages[manifest.stage_index]


def _request(shard: Sharded, key: str) -> Sharded:
    """Return a request for the part of the tensor `key` that `shard` describes, with an empty tensor for it."""
    return replace(shard, key=key, data=torch.empty_like(shard.data, requires_grad=False))


def _grow_layer(
    shards: list[Sharded],
    layer: int | None,
    source: GrowthSource,
    stage: Stage,
    growth: GrowthConfig,
    keep_adapters: bool,
) -> None:
    """Fill one layer. Without a layer, only take part in reading the tensors of other ranks."""
    sources = stage.layers[layer].sources if layer is not None else ()
    is_new = layer is not None and stage.layers[layer].born == stage.index > 0
    merges = is_new or not keep_adapters
    shards = [shard for shard in shards if not is_adapter(shard.key) or _kept(shard, sources, source, merges)]
    requests: dict[str, Sharded] = {}
    for origin in sources:
        for shard in shards:
            key = in_layer(shard.key, origin)
            requests[key] = _request(shard, key)
            if merges:
                requests.update(_factor_requests(key, source, shard))
    loaded = load_tensors(source.path, requests, shared=True)
    if not sources:
        return
    for shard in shards:
        origins = [in_layer(shard.key, origin) for origin in sources]
        parts = [_merged(shard, loaded, key, source.scaling) if merges else loaded[key] for key in origins]
        shard.data.data.copy_(torch.stack(parts).mean(0) if len(parts) > 1 else parts[0])
        if is_new and INITS[growth.init].zero_outputs and writes_residual(shard.key):
            shard.data.data.zero_()


def _kept(shard: Sharded, sources: Sequence[int], source: GrowthSource, merges: bool) -> bool:
    """Return whether an adapter continues from the checkpoint instead of starting fresh."""
    return not merges and in_layer(shard.key, sources[0]) in source.tensors


def _factor_requests(weight_key: str, source: GrowthSource, shard: Sharded) -> Iterator[tuple[str, ShardedTensor]]:
    """Yield requests for the whole A and B on a weight, if the checkpoint has them."""
    for key in factor_keys(weight_key):
        if weight_key.endswith(".weight") and key in source.tensors:
            whole = torch.empty(source.tensors[key], dtype=shard.data.dtype, device=shard.data.device)
            yield key, ShardedTensor.from_rank_offsets(key, whole)


def _merged(shard: Sharded, loaded: Mapping[str, Tensor], key: str, scaling: float) -> Tensor:
    """Return the part of W + s B A that `shard` describes, in fp32."""
    weight = decode(loaded[key])
    in_key, out_key = factor_keys(key)
    if in_key in loaded:
        part = replace(
            shard, data=weight, **({} if isinstance(shard, ShardedTensorFactory) else {"dtype": torch.float32})
        )
        for piece in part.build() if isinstance(part, ShardedTensorFactory) else [part]:
            add_product(piece, loaded[in_key], loaded[out_key], scaling)
    return weight

"""Build the model chunks of this rank, and name their weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

from megatron_step.config.model import ModelConfig
from megatron_step.engine.gradient_types import check_gradient_types
from megatron_step.engine.parallel import Parallel
from megatron_step.engine.transformer_engine import has_transformer_engine
from megatron_step.layers.spec import block_spec
from megatron_step.model.gpt import GPTModel
from megatron_step.model.initialize import initialize
from megatron_step.model.transformer_config import transformer_config
from megatron_step.plan.stages import even_layout
from megatron_step.plan.states import activation_format, weight_format

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory
"""A weight as checkpoints know it: whole, or fused of several that are saved apart."""


def build_model(
    model: ModelConfig,
    vocab_size: int,
    parallel: Parallel,
    precision: str,
    seed: int,
    layout: Sequence[int] | None = None,
) -> list[GPTModel | Float16Module]:
    """Build this rank's model chunks, one for each virtual pipeline rank, with initial weights.

    `vocab_size` is the tokenizer's; the embedding is padded to model.padded_vocab_size(vocab_size) rows. `layout` gives
    the number of layers in every chunk of the pipeline; without it model.num_layers layers are split evenly.

    Raises ValueError if this torch cannot train at the precision.
    """
    widens_weights = weight_format(precision) != activation_format(precision)
    if widens_weights:
        check_gradient_types()
    transformer_engine = has_transformer_engine() and not widens_weights  # it has one type for both
    pipeline, virtual = parallel.config.pipeline_parallel_size, parallel.config.virtual_pipeline_size
    layout = even_layout(model.num_layers, pipeline * virtual) if layout is None else layout
    model = replace(model, num_layers=sum(layout))
    config = transformer_config(model, layout, parallel.config, precision, transformer_engine)
    chunks: list[GPTModel | Float16Module] = []
    for vp_stage in range(virtual):
        vp = vp_stage if virtual > 1 else None
        chunk = GPTModel(
            model,
            config,
            block_spec(layout[vp_stage * pipeline + parallel.pp_rank], model.qk_norm, transformer_engine),
            parallel.groups,
            vocab_size,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp),
            vp_stage=vp,
        )
        initialize(sharded_state(chunk, parallel), model, seed)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def sharded_state(chunk: GPTModel | Float16Module, parallel: Parallel) -> dict[str, object]:
    """Return a chunk's weights as megatron-core's sharded tensors; keys number the layers over the whole model."""
    return chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True, "dp_cp_group": parallel.groups.dp_cp})


def sharded_weights(chunks: Sequence[torch.nn.Module], parallel: Parallel) -> dict[str, Sharded]:
    """Every weight of this rank's chunks, wrapped for data parallelism or not; the tensors are the live parameters."""
    modules = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in chunks]
    return {
        f"{index}.{name}": shard
        for index, module in enumerate(modules)
        for name, shard in sharded_state(module, parallel).items()
        if isinstance(shard, Sharded)
    }

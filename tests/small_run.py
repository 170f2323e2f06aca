"""Runs small enough for tests: their config, made-up batches, and whole tensors put together from shards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_step.checkpoint.load import find_checkpoint, load_weights
from megatron_step.checkpoint.manifest import saved_recipe
from megatron_step.checkpoint.states import load_states
from megatron_step.config.cluster import PlannerConfig
from megatron_step.config.data import DataConfig
from megatron_step.config.model import ModelConfig
from megatron_step.config.optimization import OptimizerConfig, ScheduleConfig
from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import CheckpointConfig, EvaluationConfig, LoggingConfig, RunConfig, TrainingConfig
from megatron_step.config.stages import AdapterConfig, FreezeConfig, GrowthConfig, OldLayersConfig, StagesConfig
from megatron_step.engine.parallel import Parallel, first_problem
from megatron_step.model.build import sharded_weights
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import Recipe, training_recipe
from megatron_step.planner.plan import make_plan
from megatron_step.training.state import TrainState, build_state
from megatron_step.training.step import Microbatch

VOCAB_SIZE = 250  # padded to 256 rows

PLAIN: dict[str, Any] = {"num_query_groups": 2}
"""Grouped-query attention, embeddings not tied."""
TIED: dict[str, Any] = {"num_query_groups": 2, "tie_embeddings": True, "qk_norm": True, "qkv_bias": True}
"""All that PLAIN has not."""


def small_config(
    output_dir: str = "unused",
    *,
    model: dict[str, Any] | None = None,
    data: DataConfig | None = None,
    steps: int = 10,
    stages: dict[str, Any] | None = None,
    growth: dict[str, Any] | None = None,
    freeze: dict[str, Any] | None = None,
    old_layers: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    planner: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
) -> RunConfig:
    """A run of a model with 4 layers of width 64, by sections that differ from it."""
    sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32}
    return RunConfig(
        output_dir=output_dir,
        model=ModelConfig(**{**sizes, **(PLAIN if model is None else model)}),
        data=data or DataConfig(train=[(1.0, "unused")], tokenizer="unused", validation=[(1.0, "unused")]),
        stages=StagesConfig(**{"steps": steps, **(stages or {})}),
        growth=GrowthConfig(**(growth or {})),
        freeze=FreezeConfig(**(freeze or {})),
        old_layers=OldLayersConfig(**(old_layers or {})),
        adapter=AdapterConfig(**{"rank": 4, "alpha": 8, **(adapter or {})}),
        # A step that does not make training chaotic, and an epsilon above tiny gradients: rounding errors stay small.
        optimizer=OptimizerConfig(**{"learning_rate": 2e-3, "epsilon": 1e-6, **(optimizer or {})}),
        schedule=ScheduleConfig(**{"kind": "wsd", "warmup_steps": 3, "rewarm_steps": 2, **(schedule or {})}),
        parallel=ParallelConfig(**(parallel or {})),
        training=TrainingConfig(
            **{"global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", **(training or {})}
        ),
        checkpoint=CheckpointConfig(**{"interval": 5, **(checkpoint or {})}),
        evaluation=EvaluationConfig(**{"interval": 0, "steps": 2, **(evaluation or {})}),
        planner=PlannerConfig(**(planner or {})),
        logging=LoggingConfig(interval=5, tensorboard=False),
    )


def loaded_state(config: RunConfig, folder: Path, parallel: Parallel, saved: Recipe | None = None) -> TrainState:
    """The state of the newest checkpoint in `folder`, of a run of one stage, in the recipe and layout of `config`.

    The states are read by the recipe `saved`; None for the one that the checkpoint names.
    """
    found = find_checkpoint(folder, "auto", parallel)
    assert found is not None
    plan = make_plan(resolve(config, VOCAB_SIZE))
    state = build_state(config, plan, plan.stages[0], found.manifest.step, VOCAB_SIZE, parallel)
    load_weights(found.path, state.chunks, parallel)
    # Main weights of a new optimizer are those of the initial weights: all of them come from the checkpoint.
    weights, saved = sharded_weights(state.chunks, parallel), saved or saved_recipe(found.manifest)
    load_states(found.path, state.optimizer, weights, saved, training_recipe(config), parallel)
    return state


def made_up_batch(config: RunConfig, seed: int, parallel: Parallel, batch_size: int | None = None) -> list[Microbatch]:
    """This rank's micro-batches of a global batch of random tokens; the batch is the same in every layout."""
    generator = torch.Generator().manual_seed(seed)
    samples = batch_size or config.training.global_batch_size
    tokens = torch.randint(0, VOCAB_SIZE, (samples, config.model.seq_length + 1), generator=generator)
    size = config.training.micro_batch_size
    own = tokens.split(size)[parallel.dp_rank :: parallel.dp_size]
    return [{"tokens": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()} for part in own]


def manifest_facts(config: RunConfig, stage_index: int = 0) -> dict[str, Any]:
    """Manifest fields, except step and files, for a checkpoint that is made without a run's data."""
    return {
        "stage_index": stage_index,
        "consumed_samples": 0,
        "vocab_size": VOCAB_SIZE,
        "config": asdict(config),
        "plan": make_plan(resolve(config, VOCAB_SIZE)).to_dict(),
        "data_fingerprint": {},
        "layout": {},
    }


def spread(chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
    """Make adapters matter, and norms and biases differ between layers, the same on ranks that hold the same weight."""
    for index, chunk in enumerate(chunks):
        for name, param in chunk.named_parameters():
            if param.dim() == 1 or name.endswith("adapter.linear_out.weight"):
                split = getattr(param, "tensor_model_parallel", False)
                place = (name, index, parallel.pp_rank, parallel.tp_rank if split else 0)
                generator = torch.Generator().manual_seed(crc32(repr(place).encode()))
                param.data += 0.05 * torch.randn(param.shape, generator=generator)


def whole_tensors(
    state: TrainState, parallel: Parallel, read: Callable[[Tensor], Tensor], trained_only: bool = False
) -> dict[str, Tensor] | None:
    """`read(weight)` of every weight, or trained weight, whole from all ranks' shards, by key; on rank 0, else None.

    Raises AssertionError if ranks that hold the same part of a tensor disagree about it, by more than rounding.
    """
    own = [
        (shard.key, shard.global_shape, shard.global_offset, shard.data.clone())
        for shard in _shards(state, parallel, read, trained_only)
    ]
    ranks: list[Any] = [None] * parallel.world_size
    torch.distributed.all_gather_object(ranks, own)
    whole, problem = _put_together([shard for rank in ranks for shard in rank]) if parallel.is_main else (None, None)
    problem = first_problem(problem)
    assert problem is None, problem
    return whole


def _put_together(shards: list[tuple[str, Any, Any, Tensor]]) -> tuple[dict[str, Tensor], str | None]:
    """Whole tensors from key, whole shape, offset and part; and what is wrong with them."""
    whole: dict[str, Tensor] = {}
    for key, shape, offset, part in shards:
        tensor = whole.setdefault(key, torch.full(shape, torch.nan))
        place = tuple(slice(start, start + length) for start, length in zip(offset, part.shape))
        if not tensor[place].isnan().all() and not torch.allclose(part.float(), tensor[place], rtol=1e-5, atol=1e-6):
            return whole, f"ranks disagree about {key}"
        tensor[place] = part.float()
    missing = [key for key, tensor in whole.items() if tensor.isnan().any()]
    return whole, f"no rank holds all of {missing}" if missing else None


def _shards(
    state: TrainState, parallel: Parallel, read: Callable[[Tensor], Tensor], trained_only: bool
) -> Iterator[ShardedTensor]:
    for shard in sharded_weights(state.chunks, parallel).values():
        if trained_only and not shard.data.requires_grad:
            continue
        data = read(shard.data).view_as(shard.data)
        if isinstance(shard, ShardedTensorFactory):
            yield from replace(shard, data=data).build()
        else:
            yield replace(shard, data=data, dtype=data.dtype)


def gather_gradients(state: TrainState, parallel: Parallel) -> None:
    """Give every data-parallel rank the whole gradient, of which the distributed optimizer leaves it a part."""
    if not parallel.config.distributed_optimizer:
        return
    for buffer in (buffer for chunk in state.chunks for buffer in chunk.buffers):
        for bucket in buffer.buckets:
            own = bucket.grad_data.view(parallel.dp_size, -1)[parallel.dp_rank].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=parallel.groups.dp_cp)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by its key."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(entry.size, torch.nan).to(entry.properties.dtype)
        for key, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    assert tensors, f"{path} holds no tensors"
    return tensors

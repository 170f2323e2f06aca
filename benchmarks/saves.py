"""Compare the memory that a save and a load add to the processes of a world with the planned host memory.

An asynchronous save is measured at its worst: the processes that write wait until the ranks have trained on.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.memory import Case, case_config, describe, random_batch
from benchmarks.process_memory import AddedMemory
from benchmarks.timing import Row
from benchmarks.world import in_world
from megatron_step.checkpoint import writer
from megatron_step.checkpoint.directory import list_checkpoints
from megatron_step.checkpoint.load import load_weights
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.checkpoint.states import load_states
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.host_memory import keep_freed_memory
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import training_recipe
from megatron_step.planner.costs.held import held_chunks
from megatron_step.planner.costs.memory import HostMemory, host_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.hooks.saving import description
from megatron_step.training.state import TrainState, build_state
from megatron_step.training.step import train_step

MODEL = ModelConfig(
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=2048,
    num_attention_heads=12,
    seq_length=64,
    vocab_size=8192,
)
"""A model of 98 million weights."""
_PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
_PP4: dict[str, Any] = {"pipeline_parallel_size": 4}
_ASYNCHRONOUS = {"checkpoint": {"asynchronous": True}}

CASES = (
    Case(4, "fp32", _PP4, (12,)),
    Case(4, "fp32", _PP4, (12,), _ASYNCHRONOUS),
    Case(4, "bf16", _PP2, (12,)),
    Case(4, "bf16", _PP2, (12,), _ASYNCHRONOUS),
    Case(4, "bf16", {**_PP2, "tensor_parallel_size": 2}, (12,)),
)
"""Configs with one stage."""
_STEPS_MEANWHILE = 2
_MEBIBYTE = 2**20


class Measured(NamedTuple):
    """Memory of a rank's checkpoint."""

    planned: HostMemory
    saved_bytes: int
    """Bytes that a save added."""
    loaded_bytes: int
    """Bytes that a load added."""


def run(cases: Sequence[Case] = CASES, model: ModelConfig = MODEL) -> list[Row]:
    """Return a row for each case: planned and added MiB of the fullest rank, and the most above a rank's plan."""
    return [compare(case, in_world(case.world_size, measure, case_config(case, model))) for case in cases]


def compare(case: Case, ranks: Sequence[Measured]) -> Row:
    """Return the row of a case from the measurements of its ranks."""
    saves = [(rank.planned.save_bytes / _MEBIBYTE, rank.saved_bytes / _MEBIBYTE) for rank in ranks]
    loads = [(rank.planned.load_bytes / _MEBIBYTE, rank.loaded_bytes / _MEBIBYTE) for rank in ranks]
    figures: Row = {}
    for name, pairs in (("save", saves), ("load", loads)):
        figures[f"{name}_planned"] = max(planned for planned, _ in pairs)
        figures[f"{name}_added"] = max(added for _, added in pairs)
        figures[f"{name}_above"] = max(added - planned for planned, added in pairs)
    return {
        "benchmark": "memory that a save and a load add to a rank, MiB",
        "ranks": case.world_size,
        "config": describe(case),
        **figures,
    }


def measure(config: RunConfig) -> Measured:
    """Measure a save and a load of this rank."""
    assert config.model.vocab_size is not None
    with parallel_layout(config.parallel, seed=1) as parallel, keep_freed_memory():
        resolved = resolve(config, config.model.vocab_size, parallel.dp_size)
        plan = make_plan(resolved)
        state = build_state(config, plan, plan.stages[0], 0, config.model.vocab_size, parallel)
        batch = random_batch(config, parallel)
        train_step(state, batch, 1e-4, config, parallel, False)
        facts = description(config, plan, config.model.vocab_size, {}, parallel)(state)

        def train_on() -> None:
            for _ in range(_STEPS_MEANWHILE):
                train_step(state, batch, 1e-4, config, parallel, False)

        with _shared_folder(parallel) as folder:
            saver = CheckpointSaver(folder, config.checkpoint, parallel)
            saved_bytes = _measure_save(saver, state, facts, config, train_on)
            ((_, path),) = list_checkpoints(folder)
            loaded_bytes = _measure_load(path, state, config, parallel)
        parameters = held_chunks(resolved, state.stage)[parallel.pp_rank][0].parameters
        return Measured(host_memory(resolved, parameters), saved_bytes, loaded_bytes)


@contextmanager
def _shared_folder(parallel: Parallel) -> Iterator[Path]:
    """Give every rank the path of one temporary folder."""
    with tempfile.TemporaryDirectory() as own:
        paths: list[Any] = [own]
        torch.distributed.broadcast_object_list(paths)
        yield Path(paths[0])
        torch.distributed.barrier()  # the first rank removes the folder


def _measure_save(
    saver: CheckpointSaver, state: TrainState, facts: dict[str, Any], config: RunConfig, train_on: Callable[[], None]
) -> int:
    """Return the bytes that a save adds to this process, and those that its writer keeps while training goes on."""
    may_write = get_context("fork").Event()
    write = writer.write_file

    def write_later(*arguments: Any) -> None:
        may_write.wait()
        write(*arguments)

    if not config.checkpoint.asynchronous:
        may_write.set()
    with patch.object(writer, "write_file", write_later):
        with AddedMemory() as saving:
            saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, facts)
        with AddedMemory() as writing:
            if config.checkpoint.asynchronous:
                train_on()
                may_write.set()
            saver.finish()
    return saving.own_bytes + writing.child_bytes


def _measure_load(path: Path, state: TrainState, config: RunConfig, parallel: Parallel) -> int:
    """Return the bytes that a load of weights and optimizer states adds."""
    recipe = training_recipe(config)
    with AddedMemory() as loading:
        load_weights(path, state.chunks, parallel)
        load_states(path, state.optimizer, sharded_weights(state.chunks, parallel), recipe, recipe, parallel)
    return loading.own_bytes

"""The process groups of a run, and this process's ranks in them."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import Store

from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.agreement import current_ranks
from megatron_step.engine.device import current_device

_TIMEOUT = timedelta(minutes=30)  # for one collective: ranks may wait for a save of a large model


Meeting = tuple[Store, int, int]
"""The store in which ranks have met, this rank, and the number of ranks."""


@dataclass(frozen=True)
class Parallel:
    """The layout of a run, and this process's ranks in its groups."""

    config: ParallelConfig
    """The layout."""
    groups: ProcessGroupCollection
    """megatron-core's process groups of the layout."""
    device: torch.device
    """The device of this process's tensors."""
    global_rank: int
    """Rank in the world."""
    world_size: int
    """Processes in the world."""
    tp_rank: int
    """Rank in the tensor-parallel group."""
    pp_rank: int
    """Rank in the pipeline-parallel group."""
    dp_rank: int
    """Rank in the data-parallel group."""
    dp_size: int
    """Ranks of the data-parallel group."""

    @property
    def is_main(self) -> bool:
        """Return whether this process writes the run's log and metrics."""
        return self.global_rank == 0

    @property
    def reads_data(self) -> bool:
        """Return whether this process has the embedding or computes the loss."""
        return self.pp_rank in (0, self.config.pipeline_parallel_size - 1)


def start_world(alone: bool = False, meeting: Meeting | None = None) -> None:
    """Join the process group that the environment describes; without one, or with `alone`, make one of this process.

    A launcher sets RANK, WORLD_SIZE, MASTER_ADDR and so on. A shell in a job's pod may have these variables, too, but
    no other rank will join: work for one process passes `alone`. Ranks that have met in a store pass `meeting`.
    """
    if torch.distributed.is_initialized():
        return
    # megatron-core 0.16 calls collectives by names that newer releases of torch deprecate.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|megatron\.core).*")
    # megatron-core warns about TransformerEngine's modules, and about gradients that it only inspects.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    else:
        # megatron-core warns that the device and the CPU share one generator; without a GPU they always do.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    if meeting is not None:
        store, rank, size = meeting
        store.set_timeout(_TIMEOUT)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    elif "RANK" in os.environ and not alone:
        torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


@contextmanager
def parallel_layout(config: ParallelConfig, seed: int, alone: bool = False) -> Iterator[Parallel]:
    """Make the process groups of a layout over the whole world, and destroy them at the end of the block.

    `seed` seeds the random numbers of every rank (megatron-core's tracker): equal ones where ranks of a tensor-parallel
    group must agree, different ones elsewhere. `start_world` explains `alone`.

    Raises ValueError if the world does not fit the layout.
    """
    start_world(alone)
    world_size = torch.distributed.get_world_size()
    dp_size = config.data_parallel_size(world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_size if config.virtual_pipeline_size > 1 else None,
    )
    try:
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield Parallel(
            config=config,
            groups=ProcessGroupCollection.use_mpu_process_groups(),
            device=current_device(),
            global_rank=torch.distributed.get_rank(),
            world_size=world_size,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=dp_size,
        )
    finally:
        parallel_state.destroy_model_parallel()


def first_problem(problem: str | None) -> str | None:
    """Return, on every rank, the problem of the lowest rank that has one, or None; every rank must call it."""
    return next((text for text in current_ranks().gather(problem) if text is not None), None)


def stop_world() -> None:
    """Destroy the default process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

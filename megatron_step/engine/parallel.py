"""The process groups of a run, and where in them this process stands."""

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

_TIMEOUT = timedelta(minutes=30)  # of a collective: saves of large models take long


Meeting = tuple[Store, int, int]
"""Where ranks have met, this rank, and how many there are."""


@dataclass(frozen=True)
class Parallel:
    """This process's place among tensor-, pipeline- and data-parallel ranks."""

    config: ParallelConfig
    """The layout asked for."""
    groups: ProcessGroupCollection
    """megatron-core's process groups of this layout."""
    device: torch.device
    """Where this process's tensors live."""
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
        """Whether this process writes the run's log and metrics."""
        return self.global_rank == 0

    @property
    def reads_data(self) -> bool:
        """Whether this process has the embedding or computes the loss."""
        return self.pp_rank in (0, self.config.pipeline_parallel_size - 1)


def start_world(alone: bool = False, meeting: Meeting | None = None) -> None:
    """Join the world that the environment describes; without one, or with `alone`, make a world of this process.

    A launcher describes it (RANK, WORLD_SIZE, MASTER_ADDR, ...), but so does the environment of a shell in a job's pod,
    where nobody else joins: work for one process is done `alone`. Ranks that have met in a store join at `meeting`.
    """
    if torch.distributed.is_initialized():
        return
    # megatron-core 0.16 calls collectives by names that newer releases of torch call deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|megatron\.core).*")
    # Its own advice is for TransformerEngine's modules, or about gradients that it only looks for.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    else:
        # On the CPU the "device's" random numbers are the CPU's: the warning that they move together is no news.
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
    """Make the process groups of a layout over the whole world, and take them down at the end.

    `alone` is that of `start_world`.
    `seed` seeds the random numbers of every rank: equal ones where ranks of a tensor-parallel group must agree,
    different ones elsewhere (megatron-core's tracker).

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
    """Return the problem of the lowest rank that has one, the same on every rank; every rank must call it."""
    return next((text for text in current_ranks().gather(problem) if text is not None), None)


def stop_world() -> None:
    """Leave the world."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

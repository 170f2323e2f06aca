"""A world of processes for one benchmark."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from megatron_step.engine.parallel import start_world, stop_world


def in_world(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(*arguments)`, a function at the top of a file, as each of `world_size` ranks; return their results.

    Raises RuntimeError if a process fails.
    """
    context = get_context("spawn")
    found = context.SimpleQueue()
    port = _free_port()
    # Not daemonic, because a rank starts the process that writes its asynchronous checkpoint.
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, work, arguments, found))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    while found.empty() and not any(process.exitcode for process in processes):
        processes[0].join(timeout=0.1)
    for process in processes:
        if found.empty():
            process.terminate()  # a rank has failed, and the others may wait for it
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a world of {world_size} ranks failed: see its error above")
    results: list[Any] = found.get()
    return results


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    rank: int, world_size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], found: Any
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    start_world()
    own = work(*arguments)
    results: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(results, own)
    if rank == 0:
        found.put(results)
    stop_world()

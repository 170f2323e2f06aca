"""The world of a training run: its ranks meet in a store, report their problems, and join a process group."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic, sleep

import torch
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from megatron_step.engine.agreement import Ranks, agreement_store, current_ranks
from megatron_step.engine.parallel import start_world

_MEETING_SECONDS = 1800.0  # time for rank 0 to start
_WAITING_SECONDS = 15.0  # wait after which a rank prints what it waits for


@contextmanager
def open_world(problem: Exception | None = None) -> Iterator[Ranks]:
    """Join the ranks that the environment describes, as torchrun sets it; without WORLD_SIZE, stay alone.

    An error that ends the block on one rank is printed and ends the block on all ranks within seconds. So does
    `problem`, an error that this rank has already met. The process group stays; `stop_world` destroys it.

    Raises ValueError if the environment is incomplete or the port is taken, and OSError if rank 0 cannot be reached.
    """
    if torch.distributed.is_initialized():  # the caller made the process group, and watches it
        with current_ranks().together():
            _raise(problem)
        yield current_ranks()
        return
    size = _number("WORLD_SIZE", 1)
    rank = 0 if size == 1 else _number("RANK")
    if not 0 <= rank < size:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {size}: RANK must be at least 0 and below WORLD_SIZE")
    store = HashStore() if size == 1 else _meet(rank, size)
    ranks = Ranks(agreement_store(store), rank, size)
    with ranks.watch():
        with ranks.together():
            _raise(problem)
        start_world(meeting=(store, rank, size))
        yield ranks


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def _number(name: str, default: int | None = None) -> int:
    """Read a number from the environment.

    Raises ValueError if the variable `name` is missing or not a number.
    """
    text = os.environ.get(name, default)
    if text is None:
        raise ValueError(f"{name} is not set, but WORLD_SIZE is: start the ranks with torchrun, or set {name}")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} in the environment is {text!r}, not a number: set it to a whole number") from None


def _meet(rank: int, size: int) -> Store:
    """Connect to the store of the world: torchrun's, or one that rank 0 opens at MASTER_ADDR and MASTER_PORT.

    Raises ValueError if the port is taken, and OSError if rank 0 cannot be reached.
    """
    host, port = os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT")
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not holds:
        _reach(host, port, rank)
    try:
        store = TCPStore(host, port, size, holds, timedelta(seconds=_MEETING_SECONDS), wait_for_workers=False)
    except RuntimeError as error:
        raise ValueError(f"rank {rank} cannot use port {port} of {host}: {error}. Set another MASTER_PORT") from None
    # torchrun starts failed ranks again with the same store.
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _reach(host: str, port: int, rank: int) -> None:
    """Wait until rank 0 listens. Python waits here, since torch's wait does not handle signals.

    Raises OSError if rank 0 does not listen in time.
    """
    start, said = monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            waited = monotonic() - start
            if waited > _MEETING_SECONDS:
                raise OSError(
                    f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}. Check MASTER_ADDR, MASTER_PORT and "
                    "the firewall"
                ) from None
            if waited > _WAITING_SECONDS and not said:
                said = True
                print(f"rank {rank} waits for rank 0 at {host}:{port}: {error}", file=sys.stderr, flush=True)
        sleep(0.2)

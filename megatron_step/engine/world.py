"""The world of a training run: its ranks meet in a store, say whether they can begin, and join a process group."""

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

_MEETING_SECONDS = 1800.0  # for rank 0 to start
_WAITING_SECONDS = 15.0  # until a rank says what it waits for


@contextmanager
def open_world(problem: Exception | None = None) -> Iterator[Ranks]:
    """Join the ranks that the environment describes, as torchrun does, or stay alone.

    An error that ends the block on one rank ends it on all of them within seconds, and is printed; so does `problem`,
    which this rank met before. The process group stays; `stop_world` leaves it.

    Raises ValueError if the environment is incomplete or the port is taken, OSError if rank 0 cannot be reached.
    """
    if torch.distributed.is_initialized():  # the caller's world: the caller watches it
        with current_ranks().together():
            _raise(problem)
        yield current_ranks()
        return
    size = _number("WORLD_SIZE", 1)
    rank = 0 if size == 1 else _number("RANK")
    if not 0 <= rank < size:
        raise ValueError(f"RANK {rank} is none of the {size} ranks of WORLD_SIZE")
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
    """A number of the environment; raises ValueError if it is missing or none."""
    text = os.environ.get(name, default)
    if text is None:
        raise ValueError(f"{name} is not set, but WORLD_SIZE is: start the ranks with torchrun, or set {name}")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} in the environment is {text!r}, not a number") from None


def _meet(rank: int, size: int) -> Store:
    """The store of the world: torchrun's, or one that rank 0 holds at MASTER_ADDR and MASTER_PORT."""
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
    """Wait until rank 0 listens, in Python, where signals are served; raises OSError if it does not."""
    start, said = monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            waited = monotonic() - start
            if waited > _MEETING_SECONDS:
                raise OSError(f"rank {rank} cannot reach rank 0 at {host}:{port} (MASTER_ADDR): {error}") from None
            if waited > _WAITING_SECONDS and not said:
                said = True
                print(f"rank {rank} waits for rank 0 at {host}:{port}: {error}", file=sys.stderr, flush=True)
        sleep(0.2)

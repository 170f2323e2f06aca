"""Worlds of processes joined by gloo, which stay alive and run one test case after another.

Importing torch and megatron-core takes seconds, so one process (multiprocessing's fork server) imports them once and
every worker is forked from it. A case is a function at the top of a test file: each rank calls it inside the world.
"""

import ctypes
import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

_PRELOAD = ["megatron_step.training.run", "pytest"]
_PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent ends
_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed


LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class WorldError(Exception):
    """A case failed on some rank; the text is that rank's traceback, or says that the world hangs or died."""


class World:
    """`size` processes that run cases together; started by the first case, and again after one that hung."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix=f"world_{size}_"))
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._num_cases = 0

    def run(self, case: Callable[..., Any], *, seconds: float = 120.0, **arguments: Any) -> list[Any]:
        """Return the results of `case(**arguments)` on all ranks, in the order of the ranks.

        Raises WorldError if it raises on a rank, or takes longer than `seconds`.
        """
        self.start(case, **arguments)
        return self.join(seconds)

    def start(self, case: Callable[..., Any], **arguments: Any) -> None:
        """Have every rank begin with a case; `join` waits for its end."""
        if not self._processes:
            self._start_processes()
        self._num_cases += 1
        store = self._folder / f"store_{self._num_cases}"
        request = pickle.dumps((inspect.getfile(case), case.__qualname__, str(store), arguments))
        for connection in self._connections:
            connection.send_bytes(request)

    def join(self, seconds: float = 120.0) -> list[Any]:
        """Return the started case's results on all ranks, and raise WorldError as `run` does."""
        results: dict[int, Any] = {}
        problem = None
        deadline = monotonic() + seconds
        while len(results) < self.size:
            pending = [connection for rank, connection in enumerate(self._connections) if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - monotonic()))
            if not ready:
                problem = problem or f"no answer within {seconds:.0f} s from ranks {self._missing(results)}"
                break
            for connection in ready:
                rank = self._connections.index(connection)
                failure, results[rank] = self._receive(connection, rank)
                if failure is not None and problem is None:
                    problem = failure
                    deadline = min(deadline, monotonic() + _GRACE_SECONDS)
        broken = len(results) < self.size or any(not process.is_alive() for process in self._processes)
        if broken:
            problem = f"{problem}\n{self._logs()}"
            self.kill()
        if problem is not None:
            raise WorldError(problem)
        return [results[rank] for rank in range(self.size)]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(self._processes[rank].pid, number)

    def kill(self) -> None:
        """End every process at once, as kill -9 does, with all that they started."""
        for process in self._processes:
            _kill_group(process.pid)
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def close(self) -> None:
        """End the world for good."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_processes(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            # Not daemonic: checkpoints are written by processes that the workers start.
            process = context.Process(target=_serve, args=(theirs, rank, self.size, str(self._folder)))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _receive(self, connection: Connection, rank: int) -> tuple[str | None, Any]:
        try:
            succeeded, value = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(5)
            return f"rank {rank} died with exit status {self._processes[rank].exitcode}", None
        return (None, value) if succeeded else (f"rank {rank} of {self.size}:\n{value}", None)

    def _missing(self, results: dict[int, Any]) -> list[int]:
        return [rank for rank in range(self.size) if rank not in results]

    def _logs(self) -> str:
        """The last lines that each rank printed."""
        logs = sorted(self._folder.glob("rank_*.log"))
        return "\n".join(f"{log.stem}: {log.read_text(errors='replace')[-2000:]}" for log in logs)


class Worlds:
    """The worlds of a test session, by size."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        """The world of `size` ranks."""
        if size not in self._worlds:
            self._worlds[size] = World(size)
        return self._worlds[size]

    def close(self) -> None:
        """End all worlds."""
        for world in self._worlds.values():
            world.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextmanager
def launched(port: int) -> Iterator[int]:
    """Start this rank within a case like a launcher: set the environment, make no process group; give its rank."""
    import torch

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()  # all ranks are there: none may leave while others still connect
    torch.distributed.destroy_process_group()
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    os.environ.update(zip(LAUNCHER_VARIABLES, (str(rank), str(size), str(rank), "localhost", str(port))))
    try:
        yield rank
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a worker that died at once may not have made its group yet
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _serve(connection: Connection, rank: int, size: int, folder: str) -> None:
    """A worker: runs the cases that arrive until the connection closes."""
    import torch

    import megatron_step  # noqa: F401  before any case imports megatron-core

    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(f"{folder}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RANK"] = str(rank)  # only the main rank prints a run's errors
    torch.set_num_threads(1)
    gc.freeze()  # what is imported lives on: looking through it after every case takes longer than many a case
    while True:
        try:
            path, name, store, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_answer(path, name, store, arguments, rank, size)))


def _answer(path: str, name: str, store: str, arguments: dict[str, Any], rank: int, size: int) -> tuple[bool, Any]:
    """Return whether the case succeeded, and what it returned or its traceback."""
    import torch

    answer = _call(path, name, store, arguments, rank, size)
    # A rank that failed frees the others: their collectives fail when its connections close.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()  # groups that are part of a cycle keep their connections and threads
    return answer


def _call(path: str, name: str, store: str, arguments: dict[str, Any], rank: int, size: int) -> tuple[bool, Any]:
    import torch

    try:
        case = getattr(_module(path), name)
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.FileStore(store, size), rank=rank, world_size=size
        )
        return True, case(**arguments)
    except BaseException:
        return False, traceback.format_exc()


@lru_cache
def _module(path: str) -> ModuleType:
    """A test file as a module, whatever pytest calls it."""
    specification = importlib.util.spec_from_file_location(f"cases_{Path(path).stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module

"""Ranks meet as the environment says, and none waits in vain for one that cannot begin or never comes."""

import os
import signal
import socket
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from worlds import LAUNCHER_VARIABLES as VARIABLES
from worlds import World, WorldError, Worlds, free_port, launched

from megatron_step.engine import agreement
from megatron_step.engine.parallel import stop_world
from megatron_step.engine.signals import Stopped, stop_requests
from megatron_step.engine.world import open_world


def test_ranks_meet_and_join_a_process_group(worlds: Worlds) -> None:
    assert worlds(3).run(meet, port=free_port()) == [6.0] * 3


def meet(port: int) -> float:
    with launched(port), open_world() as ranks:
        total = torch.tensor(float(ranks.rank + 1))
        torch.distributed.all_reduce(total)
        assert agreement.current_ranks().gather(ranks.rank) == ranks.gather(ranks.rank) == [0, 1, 2]
    return float(total)


def test_a_problem_of_one_rank_keeps_all_from_starting(worlds: Worlds) -> None:
    start = monotonic()
    answers = worlds(3).run(begin_with_problem, port=free_port())
    assert monotonic() - start < 30
    assert answers == [(f"rank 2 on {socket.gethostname()}: no such config", False)] * 3


def begin_with_problem(port: int) -> tuple[str, bool]:
    with launched(port) as rank:
        try:
            with open_world(ValueError("no such config") if rank == 2 else None):
                pass
        except ValueError as error:
            return str(error), torch.distributed.is_initialized()
    return "", True


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_rank_that_waits_for_another_can_be_stopped(worlds: Worlds, waiting: int, tmp_path: Path) -> None:
    """Rank 0 waits for the rank that did not come; rank 1 for the store, which rank 0 would hold."""
    world = worlds(2)
    world.start(wait_alone, waiting=waiting, port=free_port(), folder=tmp_path)
    _stop_when(world, waiting, tmp_path / "waits")
    assert world.join()[waiting] == "stopped by SIGTERM before training began"


def _stop_when(world: World, rank: int, path: Path) -> None:
    deadline = monotonic() + 60
    while not path.exists():
        assert monotonic() < deadline
        sleep(0.02)
    sleep(0.5)
    world.signal(rank, signal.SIGTERM)


def wait_alone(waiting: int, port: int, folder: Path) -> str:
    with launched(port) as rank:
        if rank != waiting:
            return ""
        try:
            with stop_requests():
                (folder / "waits").touch()
                with open_world():
                    return "opened"
        except Stopped as stopped:
            return str(stopped)


def test_a_failure_ends_ranks_that_hang_in_a_collective(worlds: Worlds, tmp_path: Path) -> None:
    """Fail on one rank during loading, as a file system may; the other ranks wait in an exchange."""
    with pytest.raises(WorldError, match="rank 0 died with exit status 1"):
        worlds(2).run(hang, port=free_port(), log=tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert text.startswith(f"error: rank 1 on {socket.gethostname()}: the disk is gone\n")
    assert text.count("error:") == 1


def hang(port: int, log: Path) -> None:
    agreement._GRACE_SECONDS = 0.5
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with launched(port), open_world() as ranks:
        os.dup2(file, 2)
        if ranks.rank == 1:
            try:
                with ranks.watch():
                    raise OSError("the disk is gone")
            except OSError:
                sleep(30)  # it does not end, so that its connections stay
        torch.distributed.barrier()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two', not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE is"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set"),
    ],
)
def test_an_incomplete_environment_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), open_world():
        pass


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in zip(VARIABLES, ("0", "2", "0", "localhost", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"rank 0 cannot use port {port}.*MASTER_PORT"), open_world():
            pass


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="not so"), open_world(ValueError("not so")):
        pass
    with open_world() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        assert torch.distributed.get_world_size() == 1
    stop_world()

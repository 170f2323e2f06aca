"""The run's folder belongs to one run, and every rank sees and writes the same one."""

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from worlds import Worlds

from megatron_step.engine.agreement import current_ranks
from megatron_step.engine.output_lock import InUseError, read_token
from megatron_step.engine.signals import StopRequest
from megatron_step.training import output_folder as module
from megatron_step.training.output_folder import output_folder


def _opened(folder: Path) -> AbstractContextManager[None]:
    return output_folder(folder, current_ranks(), StopRequest())


def test_all_ranks_enter_one_folder_and_leave_it_empty(worlds: Worlds, tmp_path: Path) -> None:
    assert worlds(2).run(enter, folder=tmp_path / "run") == [True, True]
    assert list(tmp_path.iterdir()) == []


def enter(folder: Path) -> bool:
    with _opened(folder):
        is_there = folder.is_dir()
        torch.distributed.barrier()
        return is_there


def test_another_run_in_the_folder_is_refused_on_every_rank(worlds: Worlds, tmp_path: Path) -> None:
    first, second = worlds(2).run(run_twice, folder=tmp_path / "run")
    assert first == second
    assert "is in use by process" in first


def run_twice(folder: Path) -> str:
    """Rank 1 holds the folder for another run; then both ranks want it for theirs."""
    from megatron_step.engine.output_lock import output_lock

    if torch.distributed.get_rank() == 1:
        with output_lock(folder / ".lock", folder):
            return _refusal(folder)
    while read_token(folder / ".lock") is None:
        pass
    return _refusal(folder)


def _refusal(folder: Path) -> str:
    torch.distributed.barrier()
    with pytest.raises(InUseError) as caught, _opened(folder):
        pass
    return str(caught.value)


def test_a_rank_that_sees_another_folder_is_named(worlds: Worlds, tmp_path: Path) -> None:
    first, second = worlds(2).run(enter_own, folder=tmp_path)
    assert first == second
    assert first.startswith("rank 1 on ")
    assert "is on this machine another folder than on" in first


def enter_own(folder: Path) -> str:
    module._SEEN_SECONDS, kept = 0.5, module._SEEN_SECONDS
    try:
        with pytest.raises(ValueError) as caught, _opened(folder / str(torch.distributed.get_rank())):
            pass
    finally:
        module._SEEN_SECONDS = kept
    return str(caught.value)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}/file"), _opened(tmp_path / "file"):
        pass

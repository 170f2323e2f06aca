"""An error or a difference on one rank reaches all ranks within seconds, with the same text."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from worlds import Worlds

from megatron_step.checkpoint.save import SaveError
from megatron_step.engine import agreement
from megatron_step.engine.agreement import Failure, OtherRankError, Ranks, current_ranks, exit_status
from megatron_step.engine.signals import Stopped

HOST = socket.gethostname()


def _outcome(error: BaseException) -> tuple[type[BaseException], str]:
    return type(error), str(error)


def test_ranks_exchange_values_again_and_again(worlds: Worlds) -> None:
    assert worlds(4).run(gather_twice) == [([0, 1, 2, 3], [{"rank": rank} for rank in range(4)])] * 4


def gather_twice() -> tuple[list[int], list[dict[str, int]]]:
    rank = torch.distributed.get_rank()
    return current_ranks().gather(rank), current_ranks().gather({"rank": rank})


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FileNotFoundError("no tokenizer"), FileNotFoundError, "no tokenizer"),
        (OSError(28, "No space left on device", "x"), OSError, "[Errno 28] No space left on device: 'x'"),
        (SaveError("no room"), SaveError, "no room"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError, "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_one_ranks_error_is_every_ranks(worlds: Worlds, error: Exception, kind: type[Exception], text: str) -> None:
    answers = worlds(4).run(fail_together, errors={2: error, 3: ValueError("later")})
    assert len(set(answers)) == 1
    raised, said = answers[0]
    assert issubclass(raised, kind)
    assert said.startswith(f"rank 2 on {HOST}: {text}")


def test_an_error_that_all_ranks_share_names_none(worlds: Worlds) -> None:
    answers = worlds(4).run(fail_together, errors=dict.fromkeys(range(4), ValueError("not so")))
    assert answers == [(ValueError, "not so")] * 4


def test_a_fault_in_the_program_keeps_its_traceback_where_it_arose(worlds: Worlds) -> None:
    answers = worlds(2).run(fail_together, errors={1: KeyError("missing")})
    assert answers == [(OtherRankError, f"rank 1 on {HOST}: KeyError: 'missing'"), (KeyError, "'missing'")]


def test_nothing_is_raised_where_nothing_failed(worlds: Worlds) -> None:
    assert worlds(2).run(fail_together, errors={}) == [None, None]


def fail_together(errors: dict[int, Exception]) -> tuple[type[BaseException], str] | None:
    try:
        with current_ranks().together():
            if torch.distributed.get_rank() in errors:
                raise errors[torch.distributed.get_rank()]
    except Exception as error:
        return _outcome(error)
    return None


def test_what_rank_0_makes_or_raises_all_get(worlds: Worlds) -> None:
    assert worlds(2).run(make_on_main, error=None) == [41, 41]
    assert worlds(2).run(make_on_main, error=ValueError("no plan")) == [(ValueError, "no plan")] * 2


def make_on_main(error: Exception | None) -> Any:
    def make() -> int:
        assert torch.distributed.get_rank() == 0
        if error is not None:
            raise error
        return 41

    try:
        return current_ranks().from_main(make)
    except ValueError as raised:
        return _outcome(raised)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {0: "1", 1: "1", 2: "2", 3: "1"},
            f"seed differs between ranks: 2 for rank 2 on {HOST}, 1 for rank 0 on {HOST}",
        ),
        (
            {0: "2", 1: "1", 2: "1", 3: "1"},
            f"seed differs between ranks: 2 for rank 0 on {HOST}, 1 for rank 1 on {HOST}",
        ),
        ({0: "1", 1: "1", 2: "1"}, f"seed differs between ranks: nothing for rank 3 on {HOST}, 1 for rank 0"),
    ],
)
def test_the_rank_that_differs_is_named(worlds: Worlds, values: dict[int, str], message: str) -> None:
    answers = worlds(4).run(agree_on, values=values)
    assert len(set(answers)) == 1
    assert answers[0].startswith(message)
    assert answers[0].endswith(". Set one value")


def test_ranks_that_agree_go_on(worlds: Worlds) -> None:
    assert worlds(4).run(agree_on, values=dict.fromkeys(range(4), "1")) == [""] * 4


def agree_on(values: dict[int, str]) -> str:
    own = {"seed": values[torch.distributed.get_rank()]} if torch.distributed.get_rank() in values else {}
    try:
        current_ranks().agree({"same": {"size": 4}, "config": own}, {"config": "Set one value"})
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_alone_raises_its_own_error() -> None:
    ranks = Ranks(torch.distributed.HashStore(), 0, 1)
    for error in (ValueError("wrong"), KeyError("fault")):
        with pytest.raises(type(error)) as caught, ranks.watch(), ranks.together():
            raise error
        assert caught.value is error
    assert ranks.gather("value") == ["value"]
    assert ranks.from_main(lambda: 3) == 3
    assert ranks.failure() is None
    ranks.agree({"config": {"seed": 1}}, {})


def test_a_failure_elsewhere_reaches_ranks_that_wait(worlds: Worlds, tmp_path: Path) -> None:
    """Rank 1 fails where no rank expects it to: rank 0 waits in an exchange, rank 2 for rank 0."""
    start = monotonic()
    answers = worlds(3).run(fail_alone, log=tmp_path / "log")
    assert monotonic() - start < 20
    assert answers == [(OSError, f"rank 1 on {HOST}: the disk is gone"), (OSError, "the disk is gone"), answers[0]]
    assert (tmp_path / "log").read_text() == f"error: rank 1 on {HOST}: the disk is gone\n"


def fail_alone(log: Path) -> tuple[type[BaseException], str] | None:
    ranks = current_ranks()
    with _stderr_to(log):
        try:
            with ranks.watch():
                if ranks.rank == 1:
                    raise OSError("the disk is gone")
                ranks.gather(None)
        except OSError as error:
            return _outcome(error)
    return None


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Have this process's standard error in a file, as a launcher may."""
    sys.stderr.flush()
    kept, file = os.dup(2), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(file)


def test_a_rank_that_is_asked_to_stop_stops_all(worlds: Worlds) -> None:
    first, second = worlds(2).run(stop_one)
    assert second == (Stopped, "stopped by SIGTERM before training began")
    assert first == (Stopped, f"rank 1 on {HOST}: {second[1]}")


def stop_one() -> tuple[type[BaseException], str] | None:
    from megatron_step.engine.signals import stop_requests

    ranks = current_ranks()
    try:
        with stop_requests(), ranks.watch():
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            ranks.gather(None)
    except Stopped as stopped:
        return _outcome(stopped)
    return None


def test_a_rank_that_died_is_noticed(worlds: Worlds) -> None:
    answers = worlds(2).run(die_silently)
    assert answers[0][0] is OtherRankError
    assert "rank 1 did not answer for" in answers[0][1]


def die_silently() -> tuple[type[BaseException], str] | None:
    ranks = current_ranks()
    if ranks.rank == 1:
        ranks.store.add("alive/1", 1)  # its watch began, and it was killed
        return None
    agreement._SILENT_SECONDS, kept = 0.5, agreement._SILENT_SECONDS
    try:
        ranks.gather(None)
    except OtherRankError as error:
        return _outcome(error)
    finally:
        agreement._SILENT_SECONDS = kept
    return None


def test_each_log_file_of_a_machine_gets_the_line_once(worlds: Worlds, tmp_path: Path) -> None:
    """The first rank of a machine tells its reader even where another rank was faster; of one file, one rank does."""
    for logs in (["both", "both"], ["zero", "one"]):
        worlds(2).run(tell_in_turn, logs=[tmp_path / name for name in logs])
    assert (tmp_path / "both").read_text() == "error: rank 1 on there: gone\n"
    assert (tmp_path / "one").read_text() == "error: rank 1 on there: gone\n"
    assert (tmp_path / "zero").read_text() == "error: rank 1 on there: gone\n"


def tell_in_turn(logs: list[Path]) -> None:
    ranks = current_ranks()
    os.environ["LOCAL_RANK"] = str(ranks.rank)
    failure = Failure(1, "there", OSError, "gone", False)
    for turn in (1, 0):
        with _stderr_to(logs[ranks.rank]):
            if ranks.rank == turn:
                ranks.tell(failure)
        torch.distributed.barrier()
    del os.environ["LOCAL_RANK"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [(ValueError, 2), (FileNotFoundError, 2), (OSError, 1), (SaveError, 1), (Stopped, 75), (KeyError, 1)],
)
def test_the_exit_status(kind: type[BaseException], status: int) -> None:
    assert exit_status(kind) == status

"""Before training a signal stops at once; then it waits for the step in progress, and a second SIGINT ends all."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from megatron_step.engine.signals import EXIT_STOPPED, Stopped, stop_requests

SIGNALS = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_while_training(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop, stop.after_step():
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name
    assert signal.getsignal(number) is before
    assert f"{number.name}: the run finishes and saves this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_once_before_training(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name}"), stop_requests() as stop:
        os.kill(os.getpid(), number)
    assert stop
    assert signal.getsignal(number) is before


def test_a_second_sigterm_changes_nothing() -> None:
    """A cluster sends SIGTERM after SIGUSR1, while the run still saves."""
    with stop_requests() as stop, stop.after_step():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.signal_name == "SIGUSR1"


_PROGRAM = """
import os, signal
from megatron_step.engine.signals import stop_requests
with stop_requests() as stop, stop.after_step():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    print("goes on")
"""


def _program(**environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_second_control_c_ends_the_process() -> None:
    finished = _program()
    assert finished.returncode == -signal.SIGINT
    assert "goes on" not in finished.stdout
    assert "Traceback" not in finished.stderr


def test_torchruns_copy_of_a_control_c_is_no_second_one() -> None:
    finished = _program(TORCHELASTIC_RUN_ID="none")
    assert (finished.returncode, finished.stdout) == (0, "goes on\n")


def test_a_fork_goes_on() -> None:
    """A process that writes a checkpoint gets the terminal's Control-C, too."""
    with stop_requests():
        child = os.fork()
        if child == 0:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_gets_no_signals() -> None:
    seen = []

    def run() -> None:
        with stop_requests() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


def test_the_handlers_come_back_after_a_failure() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(RuntimeError), stop_requests():
        raise RuntimeError
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_status_is_that_of_a_temporary_failure() -> None:
    assert EXIT_STOPPED == os.EX_TEMPFAIL


def test_a_terminal_that_is_gone_takes_no_line_and_ends_nothing() -> None:
    program = """
import os, signal
from megatron_step.engine.signals import stop_requests
with stop_requests() as stop, stop.after_step():
    os.close(2)
    os.kill(os.getpid(), signal.SIGHUP)
    print(stop.signal_name)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, "SIGHUP\n")

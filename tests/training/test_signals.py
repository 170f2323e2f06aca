"""A signal becomes a request that is looked at between steps, and the handlers from before come back."""

import os
import signal

import pytest

from megatron_step.training.signals import EXIT_STOPPED, stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name
    assert signal.getsignal(number) is before


def test_the_handlers_come_back_after_a_failure() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(RuntimeError), stop_requests():
        raise RuntimeError
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_status_is_that_of_a_temporary_failure() -> None:
    assert EXIT_STOPPED == os.EX_TEMPFAIL

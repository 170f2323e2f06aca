"""A tape knows the most bytes that were in use at once."""

from megatron_step.plan.blocks.tape import Tape


def test_the_peak_is_the_most_at_once() -> None:
    tape = Tape(10)
    tape.take(5, 1)
    tape.free(6)
    tape.take(3)
    assert (tape.live, tape.peak) == (13, 16)

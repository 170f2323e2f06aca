"""A tape knows the most bytes that were in use at once."""

from megatron_step.plan.blocks.tape import Tape


def test_the_peak_is_the_most_at_once() -> None:
    tape = Tape(10)
    tape.take(5, 1)
    tape.free(6)
    tape.take(3)
    assert (tape.live, tape.peak) == (13, 16)


def test_a_part_that_is_followed_counts_as_if_its_events_were_the_tapes_own() -> None:
    part = Tape()
    part.free(4)
    part.take(7)
    part.free(5)
    tape = Tape(10)
    tape.follow(part)
    assert (tape.live, tape.peak) == (8, 13)
    tape.follow(part)
    assert (tape.live, tape.peak) == (6, 13)

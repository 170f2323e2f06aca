"""The learning rate warms up, stays and decays as its schedule says."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_step.config.optimization import ScheduleConfig
from megatron_step.optim.schedule import learning_rate


def _rates(total: int, **schedule: object) -> list[float]:
    return _learning_rates(ScheduleConfig(**schedule), 2.0, total)


def _learning_rates(schedule: ScheduleConfig, peak: float, total: int) -> list[float]:
    """Learning rates of a first stage without restarts."""
    return [
        learning_rate(schedule, peak, step, total, warmup_steps=schedule.warmup_steps, since_restart=step)
        for step in range(total)
    ]


def test_constant_after_a_linear_warm_up() -> None:
    assert _rates(6, kind="constant", warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_from_the_end_of_the_warm_up_to_the_minimum() -> None:
    rates = _rates(102, kind="cosine", warmup_steps=2, min_fraction=0.1)
    assert rates[2] == 2.0
    assert rates[52] == pytest.approx(1.1), "half-way, the middle of peak and minimum"
    assert rates[101] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.99)) / 2))


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_decays_over_its_last_share(shape: str, middle: float) -> None:
    rates = _rates(100, kind="wsd", warmup_steps=10, decay_fraction=0.2, decay_shape=shape)
    assert set(rates[10:81]) == {2.0}
    assert rates[90] == pytest.approx(2.0 * middle)
    assert 0 < rates[99] < rates[98]


def test_a_decay_longer_than_the_run_begins_at_the_warm_ups_end() -> None:
    rates = _rates(10, kind="wsd", warmup_steps=5, decay_fraction=1.0)
    assert rates[4:6] == [2.0, 2.0]
    assert rates[6] < 2.0


@given(
    st.sampled_from(["constant", "cosine", "wsd"]),
    st.integers(0, 30),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 40),
)
def test_the_rate_stays_between_zero_and_the_peak(
    kind: str, warmup: int, decay: float, minimum: float, total: int
) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_fraction=decay, min_fraction=minimum)  # type: ignore[arg-type]
    rates = _learning_rates(schedule, 1.0, total)
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    after = rates[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after)), "never up after the warm-up"


def test_a_restart_warms_up_again() -> None:
    schedule = ScheduleConfig(kind="constant", rewarm_steps=4)
    rates = [learning_rate(schedule, 2.0, step, 20, warmup_steps=4, since_restart=step % 10) for step in range(20)]
    assert rates[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], "the stage's own warm-up, not twice"
    assert rates[10:15] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_a_stage_that_grows_does_not_decay() -> None:
    schedule = ScheduleConfig(kind="wsd", decay_fraction=0.5)
    rates = [
        learning_rate(schedule, 2.0, step, 10, warmup_steps=0, since_restart=step, grows=True) for step in range(10)
    ]
    assert rates == [2.0] * 10

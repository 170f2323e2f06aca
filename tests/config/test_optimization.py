"""Optimizer and schedule refuse values that no run can mean."""

import pytest

from megatron_step.config.optimization import OptimizerConfig, ScheduleConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, not nan"),
        ({"weight_decay": -0.1}, "must be at least 0, not -0.1"),
        ({"clip_grad": -1.0}, "must be at least 0, not -1.0"),
        ({"beta2": 1.0}, r"must lie in \[0, 1\)"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 1e-3, **fields})


@pytest.mark.parametrize("fields", [{"warmup_steps": -1}, {"decay_fraction": 1.5}, {"min_fraction": -0.1}])
def test_a_schedule_that_cannot_be_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=f"schedule.*{next(iter(fields))}"):
        ScheduleConfig(**fields)

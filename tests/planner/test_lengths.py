"""Lengths that do not fit together give a warning with their numbers; other lengths do not."""

import re
from dataclasses import replace
from typing import Any

import pytest
from small_run import small_config

from megatron_step.config.model import RopeScalingConfig
from megatron_step.config.run import LoggingConfig, RampUpConfig
from megatron_step.optim.schedule import learning_rate
from megatron_step.plan.resolved import resolve
from megatron_step.planner.lengths import length_warnings
from megatron_step.planner.plan import make_plan

_TWO_STAGES = {"count": 2, "layers": [2, 2], "grow_at": 0.5}


def _warnings(schedule: dict[str, Any] | None = None, logging: int = 5, **sections: Any) -> list[str]:
    config = small_config(**sections)
    plain = {"warmup_steps": 0, "rewarm_steps": 0, **(schedule or {})}
    config = replace(config, schedule=replace(config.schedule, **plain), logging=LoggingConfig(interval=logging))
    return length_warnings(config, make_plan(resolve(config, 250)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"schedule": {"warmup_steps": 2000}, "steps": 6, "checkpoint": {"interval": 6}},
            "schedule.warmup_steps 2000 is more than the 6 steps of stage 1: .* only 0.3% of its peak. Set "
            "schedule.warmup_steps to at most 6",
        ),
        (
            {"schedule": {"warmup_steps": 6}, "stages": _TWO_STAGES},
            "warmup_steps 6 is more than the 5 steps of stage 1: .* 83.3%",
        ),
        (
            {"schedule": {"rewarm_steps": 20}, "stages": _TWO_STAGES},
            "schedule.rewarm_steps 20 is more than the 10 steps of stage 2: .* 50.0%",
        ),
        (
            {"schedule": {"warmup_steps": 9}},
            r"warmup_steps 9 leaves only 1 step of stage 1 for the decay, but .* 0.2 asks for 2 of its 10 .* at most 8",
        ),
        (
            {"schedule": {"scope": "run", "warmup_steps": 18}, "stages": {**_TWO_STAGES, "grow_at": 1.0}},
            r"warmup_steps 18 leaves only 2 steps of the run for the decay, .* asks for 4 of its 20 .* at most 16",
        ),
        (
            {"schedule": {"scope": "run", "decay_fraction": 0.8}, "stages": _TWO_STAGES},
            "last grows after step 5, but the learning rate decays from step 3 on .*decay_fraction to at most 0.67",
        ),
        ({"steps": 2, "checkpoint": {"interval": 2}, "logging": 2}, "decay_fraction 0.2 of the 2 steps of stage 1"),
        (
            {"stages": {**_TWO_STAGES, "grow_at": 0.05}},
            "grow_at 0.05 of the 10 steps of stage 1 is less than a step",
        ),
        (
            {"stages": _TWO_STAGES, "adapter": {"restart_interval": 10}},
            "adapter.restart_interval 10 is not less than the 10 steps of stage 2: the old layers do not change in",
        ),
        (
            {"stages": _TWO_STAGES, "adapter": {"restart_interval": 4}, "schedule": {"rewarm_steps": 8}},
            "rewarm_steps 8 is more than adapter.restart_interval 4: .* only 50.0% of its peak .* at most 4",
        ),
        ({"evaluation": {"interval": 11}}, "evaluation.interval 11 is more than the 10 steps of the run"),
        ({"checkpoint": {"interval": 11}}, "checkpoint.interval 11 is more than the 10 steps of the run"),
        ({"logging": 11}, "logging.interval 11 is more than the 10 steps of the run"),
        (
            {"checkpoint": {"interval": 4, "keep_every": 6}},
            "keep_every 6 keeps no checkpoint .* is step 12, .* 10",
        ),
        (
            {"checkpoint": {"interval": 4, "keep_every": 5}, "steps": 20},
            "keep_every 5 is not a multiple of checkpoint.interval 4: checkpoints are kept for good every 20 steps",
        ),
        (
            {"training": {"ramp_up": RampUpConfig(2, 2, 100)}},
            "ramp_up.samples 100 is more than the 20 samples of the run: .* grows to 2 samples only, not to .* 8",
        ),
        (
            {"stages": {"steps": None, "tokens": 10}, "checkpoint": {"interval": 1}, "logging": 1},
            "stages.tokens 10 is less than the 256 tokens of one step",
        ),
        (
            {"model": {"rope_scaling": RopeScalingConfig(factor=2.0, original_max_position=8)}},
            r"model.seq_length 32 is more than the 16 tokens that model.rope_scaling reaches \(factor 2.0 x .* 8\)",
        ),
    ],
)
def test_a_length_that_does_not_fit_is_named_with_the_numbers(changed: dict[str, Any], message: str) -> None:
    found = _warnings(**changed)
    assert any(re.search(message, warning) for warning in found), found


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"schedule": {"warmup_steps": 8}},
        {"schedule": {"scope": "run", "warmup_steps": 7, "decay_fraction": 0.5}, "stages": _TWO_STAGES},
        {"schedule": {"warmup_steps": 5, "rewarm_steps": 4}, "stages": _TWO_STAGES, "adapter": {"restart_interval": 4}},
        {"schedule": {"rewarm_steps": 1000}},
        {"evaluation": {"interval": 10}, "checkpoint": {"interval": 5, "keep_every": 10}},
        {"evaluation": {"interval": 1000, "steps": 0}, "checkpoint": {"interval": 0}},
        {"adapter": {"restart_interval": 1000}},
    ],
)
def test_lengths_that_fit_or_do_not_count_are_not_named(changed: dict[str, Any]) -> None:
    assert _warnings(**changed) == []


def test_the_share_of_the_peak_is_that_of_the_schedule() -> None:
    (warning,) = _warnings({"warmup_steps": 40}, checkpoint={"interval": 5})
    config = small_config()
    rate = learning_rate(replace(config.schedule, warmup_steps=40), 1.0, 9, 10, warmup_steps=40, since_restart=9)
    assert f"reaches only {rate:.1%} of its peak" in warning

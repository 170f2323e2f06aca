"""Old layers change at their policy's interval, inside a stage; a policy without a change is refused."""

from typing import Any

import pytest
from serial_oracle import state_of
from small_run import small_config

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.old_layers import Adapters, register
from megatron_step.training.hooks.old_layers import old_layers_hook, register_change
from megatron_step.training.stage import StepContext

STAGES: dict[str, Any] = {"count": 2, "layers": [4, 0], "steps": [4, 10], "grow_at": 1.0}  # steps 5 to 14 are adapted


class Counted(Adapters):
    """Adapters that a test's change counts."""

    name = "counted"


def _config(**sections: Any) -> RunConfig:
    return small_config(stages=STAGES, **{"adapter": {"restart_interval": 3}, **sections})


def test_it_comes_every_interval_but_not_at_the_end_of_a_stage(alone: Parallel) -> None:
    for interval, expected in ((3, [7, 10, 13]), (5, [9]), (0, [])):
        config = _config(adapter={"restart_interval": interval})
        hook, restarted = old_layers_hook(config, alone), []
        state = state_of(config, 1, alone)
        for step in range(5, 15):
            state.step = step
            metrics: dict[str, Any] = {}
            hook(StepContext(state, metrics, None, False))
            restarted += [step] if "pruned_share" in metrics else []
        assert restarted == expected


def test_the_first_stage_has_nothing_to_restart(alone: Parallel) -> None:
    config = _config()
    state = state_of(config, 0, alone)
    metrics: dict[str, Any] = {}
    state.step = 3
    old_layers_hook(config, alone)(StepContext(state, metrics, None, False))
    assert metrics == {}


def test_a_policys_own_change_is_called_and_a_missing_one_is_refused(alone: Parallel) -> None:
    register(Counted())
    config = _config(old_layers={"policy": "counted"})
    with pytest.raises(ValueError, match=r"old_layers\.policy counted changes old layers every 3 steps, but no change"):
        old_layers_hook(config, alone)
    steps: list[int] = []

    def change(state: Any, config: RunConfig, parallel: Parallel) -> dict[str, float]:
        steps.append(state.step)
        return {"changes": float(len(steps))}

    register_change("counted", change)
    with pytest.raises(ValueError, match="the policy counted for old layers has a change already"):
        register_change("counted", lambda state, config, parallel: {})
    hook, state = old_layers_hook(config, alone), state_of(config, 1, alone)
    metrics: dict[str, Any] = {}
    for step in range(5, 15):
        state.step = step
        hook(StepContext(state, metrics, None, False))
    assert (steps, metrics) == ([7, 10, 13], {"changes": 3.0})

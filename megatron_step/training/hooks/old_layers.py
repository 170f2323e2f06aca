"""Change old layers during a stage, at the steps that `plan/old_layers.py` decides, if their policy has a change."""

from collections.abc import Callable

from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.old_layers import changes_after, policy_of, turn_at
from megatron_step.training.hooks.restart import restart
from megatron_step.training.hooks.rotate import rotate
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.state import TrainState

Change = Callable[[TrainState, RunConfig, Parallel], dict[str, float]]
"""A function that changes the old layers of a state in place, after a step, and returns figures for the step's metrics.
A run that resumes from the checkpoint of that step must build the same state."""


def _restart(state: TrainState, config: RunConfig, parallel: Parallel) -> dict[str, float]:
    """Restart the adapters. `pruned_share` is the share of their first moments that are zero afterwards."""
    return {"pruned_share": restart(state, config, parallel)}


def _rotate(state: TrainState, config: RunConfig, parallel: Parallel) -> dict[str, float]:
    """Train the layers of the next turn. `turn` is its number in the stage, from 1."""
    rotate(state, config, parallel)
    return {"turn": turn_at(state.step, state.stage, config) + 1}


_CHANGES: dict[str, Change] = {"adapters": _restart, "rotate": _rotate}


def register_change(policy: str, change: Change) -> None:
    """Register `change`, to be called every `change_interval` steps of a stage if old_layers.policy is `policy`.

    Raises ValueError if another change is registered for that policy.
    """
    if _CHANGES.setdefault(policy, change) is not change:
        raise ValueError(f"the policy {policy} for old layers has a change already: choose another name for the policy")


def old_layers_hook(config: RunConfig, parallel: Parallel) -> Hook:
    """Return a hook that changes old layers every `change_interval` steps of a stage, but not at its end.

    Raises ValueError if the policy has an interval, but no change is registered for it.
    """
    policy = policy_of(config)
    if policy.change_interval(config) and policy.name not in _CHANGES:
        raise ValueError(
            f"old_layers.policy {policy.name} changes old layers every "
            f"{counted(policy.change_interval(config), 'step')}, but no change is registered for it: call "
            "register_change (training/hooks/old_layers.py) in the module that registers the policy"
        )

    def hook(context: StepContext) -> None:
        state = context.state
        if changes_after(state.step, state.stage, config):
            context.metrics.update(_CHANGES[policy.name](state, config, parallel))

    return hook

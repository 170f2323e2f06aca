"""Changes old layers in the course of a stage, as their policy says; when, `plan/old_layers.py` decides."""

from collections.abc import Callable

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.plan.old_layers import changes_after, policy_of
from megatron_step.training.hooks.restart import restart
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.state import TrainState

Change = Callable[[TrainState, RunConfig, Parallel], dict[str, float]]
"""Changes the old layers of a state, in place, after a step. It returns figures for the step's metrics. A run that
resumes after it must build the same state from the checkpoint of that step."""


def _restart(state: TrainState, config: RunConfig, parallel: Parallel) -> dict[str, float]:
    """Restart the adapters. `pruned_share` is the share of their first moments that are zero afterwards."""
    return {"pruned_share": restart(state, config, parallel)}


_CHANGES: dict[str, Change] = {"adapters": _restart}


def register_change(policy: str, change: Change) -> None:
    """Have `change` called every `change_interval` steps of a stage where old_layers.policy is `policy`.

    Raises ValueError if that policy has another one.
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
            f"old_layers.policy {policy.name} changes old layers every {policy.change_interval(config)} steps, but "
            "nothing says how: call register_change (training/hooks/old_layers.py) in the module that registers it"
        )

    def hook(context: StepContext) -> None:
        state = context.state
        if changes_after(state.step, state.stage, config):
            context.metrics.update(_CHANGES[policy.name](state, config, parallel))

    return hook

"""Policies for old layers: what a stage does with the layers that earlier stages added.

policy      matrices and biases      norms                        adapters
frozen      frozen                   trained, unless freeze.norms none
adapters    frozen                   trained, unless freeze.norms on adapter.targets (LoRA, Hu et al., 2022)
trained     trained                  trained, unless freeze.norms none

A policy decides for each weight whether it is trained, and which linears get adapters. The model, and the planner's
bytes, operations and exchanged bytes, follow from these two answers, so a new policy needs nothing else. A policy may
also change the old layers at an interval of steps; training/hooks/old_layers.py makes the change.

A user's own policy is a subclass of `Policy`; `register` makes its name a value of old_layers.policy.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_step.config.run import RunConfig, check_adapter_rank
from megatron_step.config.stages import Target
from megatron_step.plan.names import is_adapter, is_norm, layer_of
from megatron_step.plan.stages import Stage

Role = Literal["base", "embedding", "new_layer", "adapter"]
"""The role of a weight in the optimizer: each role except `base` has its own learning rate."""


@dataclass(frozen=True)
class Treatment:
    """What a stage does with a weight."""

    trained: bool
    """Whether the weight has a gradient and optimizer states; otherwise it is frozen."""
    role: Role
    """The weight's role in the optimizer."""
    since: int
    """Index of the stage that created the optimizer states. Growth carries over the states of an earlier stage."""


class Policy(ABC):
    """A rule for old layers. A layer is old in every stage after the one that added it."""

    name: str
    """The policy's value of old_layers.policy."""
    trains_all: bool = False
    """Whether the policy trains every matrix of old layers, which freeze.layers false requires."""
    adds_adapters: bool = False
    """Whether linears of old layers get adapters. The section `adapter` sets their rank, alpha and dropout."""
    period: int = 1
    """Number of old layers after which the treatment repeats. The planner uses the mean cost of a period."""
    interval_key: str = ""
    """Config key that `change_interval` reads, for messages."""

    @property
    def effect(self) -> str:
        """What happens to old layers, as a clause, for people."""
        return f"the policy {self.name} decides how old layers are trained"

    @abstractmethod
    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Return what `stage` does with the weight `key` of an old layer or of its adapters, after `turn` changes.

        A change must not alter the bytes on any rank.
        """

    def adapter_targets(self, layer: int, stage: Stage, config: RunConfig) -> Sequence[Target]:
        """Return the linears that get adapters in the old layer with the index `layer`."""
        return config.adapter.targets if self.adds_adapters else ()

    def keeps_adapters(self, config: RunConfig) -> bool:
        """Return whether adapters stay when the model grows. Otherwise growth merges them into their weights."""
        return False

    def change_interval(self, config: RunConfig) -> int:
        """Return the number of steps between changes of old layers in a stage; 0 if there are no changes."""
        return 0

    def check(self, config: RunConfig) -> None:
        """Raise ValueError if other keys of the config contradict this policy."""
        if not config.freeze.layers and not self.trains_all:
            raise ValueError(
                f"freeze.layers false trains all weights of old layers, but old_layers.policy {self.name} does not: "
                "remove one of the two keys"
            )
        if self.adds_adapters and config.adapter.rank == 0:
            raise ValueError(
                f"old_layers.policy {self.name} adds adapters, but adapter.rank is 0: set adapter.rank to at least 1, "
                "or old_layers.policy to frozen"
            )
        if self.adds_adapters and config.stages.count > 1:
            check_adapter_rank(config)


class Frozen(Policy):
    """Freezes matrices and biases."""

    name = "frozen"
    effect = "old layers are frozen"

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Train only norms, unless freeze.norms."""
        return Treatment(is_norm(key) and not config.freeze.norms, "base", stage.layers[layer_of(key)].born)


class Adapters(Frozen):
    """Freezes matrices and biases, and trains low-rank adapters on them.

    With adapter.restart_interval the adapters are merged and drawn again during a stage (ReLoRA, Lialin et al., 2023).
    """

    name = "adapters"
    effect = "old layers are frozen and get adapters"
    adds_adapters = True
    interval_key = "adapter.restart_interval"

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Train adapters. Their states begin in this stage, or in the one after their layer's if adapters are kept."""
        if is_adapter(key):
            born = stage.layers[layer_of(key)].born
            return Treatment(True, "adapter", born + 1 if self.keeps_adapters(config) else stage.index)
        return super().treatment(key, turn, stage, config)

    def keeps_adapters(self, config: RunConfig) -> bool:
        """Return whether adapter.at_stage_end keeps the adapters."""
        return config.adapter.at_stage_end == "keep"

    def change_interval(self, config: RunConfig) -> int:
        """Return the steps between restarts of adapters."""
        return config.adapter.restart_interval


class Trained(Policy):
    """Trains all weights, so that only growth remains."""

    name = "trained"
    effect = "old layers are trained, too"
    trains_all = True

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Train all weights; norms not, if freeze.norms."""
        return Treatment(not (is_norm(key) and config.freeze.norms), "base", stage.layers[layer_of(key)].born)


_POLICIES: dict[str, Policy] = {}


def register(policy: Policy) -> None:
    """Make `policy` a value of old_layers.policy.

    Raises ValueError if another one has its name.
    """
    known = _POLICIES.setdefault(policy.name, policy)
    if type(known) is not type(policy):
        raise ValueError(f"a policy for old layers called {policy.name} already exists: choose another name")


def policy_of(config: RunConfig) -> Policy:
    """Return the policy that old_layers.policy names, or that freeze.layers and adapter.rank describe.

    Raises ValueError if no policy has that name.
    """
    policy = _POLICIES.get(config.old_layer_policy)
    if policy is None:
        raise ValueError(
            f"old_layers.policy {config.old_layer_policy} is unknown: choose one of {', '.join(_POLICIES)}, or add the "
            "module that registers it to plugins"
        )
    return policy


def adapts(config: RunConfig) -> bool:
    """Return whether old layers get adapters in this run; False if the policy is not registered in this process."""
    policy = _POLICIES.get(config.old_layer_policy)
    return config.stages.count > 1 and policy is not None and policy.adds_adapters


def adapter_targets(layer: int, stage: Stage, config: RunConfig) -> Sequence[Target]:
    """Return the linears with adapters in the layer with the index `layer`; none in a layer that `stage` adds."""
    if stage.layers[layer].born == stage.index:
        return ()
    return policy_of(config).adapter_targets(layer, stage, config)


def changes_after(step: int, stage: Stage, config: RunConfig) -> bool:
    """Return whether old layers change when the run has finished `step` steps; never at the end of `stage`."""
    return stage.first_step < step < stage.last_step and since_change(step, stage, config) == 0


def since_change(step: int, stage: Stage, config: RunConfig) -> int:
    """Return the steps since the latest change in `stage`, when the run has finished `step` steps."""
    in_stage, interval = step - stage.first_step, _interval(stage, config)
    return in_stage % interval if interval else in_stage


def turn_at(step: int, stage: Stage, config: RunConfig) -> int:
    """Return the number of changes in `stage` until the run has finished `step` steps."""
    interval = _interval(stage, config)
    last = min(step, stage.last_step - 1)  # no change happens at the stage's end
    return max(0, last - stage.first_step) // interval if interval else 0


def _interval(stage: Stage, config: RunConfig) -> int:
    return policy_of(config).change_interval(config) if stage.index > 0 else 0


for _policy in (Frozen(), Adapters(), Trained()):
    register(_policy)

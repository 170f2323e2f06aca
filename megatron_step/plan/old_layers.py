"""Policies for old layers: what a stage does with the layers of earlier stages.

policy      matrices and biases      norms                        adapters
frozen      frozen                   trained, unless freeze.norms none
adapters    frozen                   trained, unless freeze.norms on adapter.targets (LoRA, Hu et al., 2022)
trained     trained                  trained, unless freeze.norms none

A policy decides, for each weight, whether it is trained, and which linears get adapters. The planner's bytes,
operations and exchanged bytes follow from these two answers, and so does the model that is built: a new policy needs
nothing else. A policy may also change the old layers every so many steps; training/hooks/old_layers.py has what is then
done.

A policy of a user's own is a subclass of `Policy`; `register` makes its name a value of old_layers.policy.
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
"""What a weight is to the optimizer: each role but `base` has its own learning rate."""


@dataclass(frozen=True)
class Treatment:
    """What a stage does with a weight."""

    trained: bool
    """Whether it has a gradient and optimizer states; without them it is frozen."""
    role: Role
    """What it is to the optimizer."""
    since: int
    """Index of the stage in which its optimizer states began. Those of an earlier stage follow the weight in growth."""


class Policy(ABC):
    """What happens to old layers. A layer is old in every stage after the one that added it."""

    name: str
    """Its value of old_layers.policy."""
    trains_all: bool = False
    """Whether it trains every matrix of old layers, as freeze.layers false asks for."""
    adds_adapters: bool = False
    """Whether it puts adapters on linears of old layers; rank, alpha and dropout are those of the section `adapter`."""
    period: int = 1
    """Old layers, bottom up, after which the treatment repeats. The planner searches with the mean costs of so many."""
    interval_key: str = ""
    """Config key that `change_interval` reads, for messages."""

    @abstractmethod
    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """What `stage` does with the weight `key` of an old layer, adapters among them, after `turn` changes.

        Bytes on each rank must be the same after every change.
        """

    def adapter_targets(self, layer: int, stage: Stage, config: RunConfig) -> Sequence[Target]:
        """Linears of the old layer with the number `layer`, from 0, that get adapters."""
        return config.adapter.targets if self.adds_adapters else ()

    def keeps_adapters(self, config: RunConfig) -> bool:
        """Whether adapters go on training as the model grows. Otherwise they are merged into their weights."""
        return False

    def change_interval(self, config: RunConfig) -> int:
        """Steps of a stage between changes of its old layers; 0 for none."""
        return 0

    def check(self, config: RunConfig) -> None:
        """Raise ValueError if other keys of the config contradict this policy."""
        if not config.freeze.layers and not self.trains_all:
            raise ValueError(
                f"old_layers.policy {self.name} does not train all of the old layers, which freeze.layers false asks "
                "for: remove one of the two keys"
            )
        if self.adds_adapters and config.adapter.rank == 0:
            raise ValueError(
                f"old_layers.policy {self.name} adds adapters, but adapter.rank is 0: set adapter.rank, or "
                "old_layers.policy to frozen"
            )
        if self.adds_adapters and config.stages.count > 1:
            check_adapter_rank(config)


class Frozen(Policy):
    """Freezes matrices and biases."""

    name = "frozen"

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Only norms go on training, unless freeze.norms."""
        return Treatment(is_norm(key) and not config.freeze.norms, "base", stage.layers[layer_of(key)].born)


class Adapters(Frozen):
    """Freezes matrices and biases, and trains low-rank adapters on them.

    With adapter.restart_interval the adapters are merged and drawn again during a stage (ReLoRA, Lialin et al., 2023).
    """

    name = "adapters"
    adds_adapters = True
    interval_key = "adapter.restart_interval"

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Adapters are trained: since this stage, or since the one after their layer's if they are kept."""
        if is_adapter(key):
            born = stage.layers[layer_of(key)].born
            return Treatment(True, "adapter", born + 1 if self.keeps_adapters(config) else stage.index)
        return super().treatment(key, turn, stage, config)

    def keeps_adapters(self, config: RunConfig) -> bool:
        """Return whether adapter.at_stage_end keeps the adapters."""
        return config.adapter.at_stage_end == "keep"

    def change_interval(self, config: RunConfig) -> int:
        """Steps between restarts."""
        return config.adapter.restart_interval


class Trained(Policy):
    """Trains everything: growth alone."""

    name = "trained"
    trains_all = True

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """All weights go on training, norms unless freeze.norms."""
        return Treatment(not (is_norm(key) and config.freeze.norms), "base", stage.layers[layer_of(key)].born)


_POLICIES: dict[str, Policy] = {}


def register(policy: Policy) -> None:
    """Make `policy` a value of old_layers.policy.

    Raises ValueError if another one has its name.
    """
    known = _POLICIES.setdefault(policy.name, policy)
    if type(known) is not type(policy):
        raise ValueError(f"a policy for old layers called {policy.name} exists already: choose another name")


def policy_of(config: RunConfig) -> Policy:
    """Return the policy that old_layers.policy names, or that freeze.layers and adapter.rank describe.

    Raises ValueError if no policy has that name.
    """
    policy = _POLICIES.get(config.old_layer_policy)
    if policy is None:
        raise ValueError(
            f"old_layers.policy {config.old_layer_policy} is not registered: choose one of {', '.join(_POLICIES)}, or "
            "name the module that registers it in plugins"
        )
    return policy


def adapts(config: RunConfig) -> bool:
    """Whether old layers get adapters in this run; also where the policy of another machine is not registered here."""
    policy = _POLICIES.get(config.old_layer_policy)
    return config.stages.count > 1 and policy is not None and policy.adds_adapters


def adapter_targets(layer: int, stage: Stage, config: RunConfig) -> Sequence[Target]:
    """Linears with adapters in the layer with the number `layer`, from 0; none in a layer that `stage` adds."""
    if stage.layers[layer].born == stage.index:
        return ()
    return policy_of(config).adapter_targets(layer, stage, config)


def changes_after(step: int, stage: Stage, config: RunConfig) -> bool:
    """Whether the old layers change after `step` finished steps of the run, inside `stage`; not at its end."""
    return stage.first_step < step < stage.last_step and since_change(step, stage, config) == 0


def since_change(step: int, stage: Stage, config: RunConfig) -> int:
    """Steps of the stage since the latest change, at `step` finished steps of the run."""
    in_stage, interval = step - stage.first_step, _interval(stage, config)
    return in_stage % interval if interval else in_stage


def turn_at(step: int, stage: Stage, config: RunConfig) -> int:
    """Changes in `stage` up to `step` finished steps of the run."""
    interval = _interval(stage, config)
    last = min(step, stage.last_step - 1)  # the stage's end brings no change
    return max(0, last - stage.first_step) // interval if interval else 0


def _interval(stage: Stage, config: RunConfig) -> int:
    return policy_of(config).change_interval(config) if stage.index > 0 else 0


for _policy in (Frozen(), Adapters(), Trained()):
    register(_policy)

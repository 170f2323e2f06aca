"""Policies for old layers: what a stage does with the layers that earlier stages added.

policy      matrices and biases      norms                        adapters
frozen      frozen                   trained, unless freeze.norms none
adapters    frozen                   trained, unless freeze.norms on adapter.targets (LoRA, Hu et al., 2022)
rotate      a share of each pipeline trained, unless freeze.norms none
            rank's layers in turn
trained     trained                  trained, unless freeze.norms none

A policy decides for each weight whether it is trained, and which linears get adapters. The model, and the planner's
bytes, operations and exchanged bytes, follow from these two answers, so a new policy needs nothing else. A policy may
also change the old layers at an interval of steps; training/hooks/old_layers.py makes the change.

A user's own policy is a subclass of `Policy`; `register` makes its name a value of old_layers.policy.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal

from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig, check_adapter_rank
from megatron_step.config.stages import Target
from megatron_step.plan.names import is_adapter, is_norm, layer_of
from megatron_step.plan.rotation import Rotation
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
    rests: bool = False
    """Whether the weight is not trained now, but its optimizer states wait on the host for a later turn."""

    @property
    def has_states(self) -> bool:
        """Whether a checkpoint has optimizer states of the weight."""
        return self.trained or self.rests


class Policy(ABC):
    """A rule for old layers. A layer is old in every stage after the one that added it."""

    name: str
    """The policy's value of old_layers.policy."""
    trains_all: bool = False
    """Whether the policy trains every matrix of old layers, which freeze.layers false requires."""
    adds_adapters: bool = False
    """Whether linears of old layers get adapters. The section `adapter` sets their rank, alpha and dropout."""
    interval_key: str = ""
    """Config key that `change_interval` reads, for messages."""

    @property
    def effect(self) -> str:
        """What happens to old layers, as a clause, for people."""
        return f"the policy {self.name} decides how old layers are trained"

    @abstractmethod
    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Return what `stage` does with the weight `key` of an old layer or of its adapters, after `turn` changes.

        Whether a weight has optimizer states must not depend on `turn`, unless the change creates and drops states.
        """

    def period(self, config: RunConfig) -> int:
        """Return after how many old layers the treatment repeats. The planner uses the mean cost of a period."""
        return 1

    def num_turns(self, stage: Stage, config: RunConfig) -> int:
        """Return after how many changes the treatment repeats. The plan has the bytes of the largest of these turns."""
        return 1

    def updates(self, key: str, steps: int, stage: Stage, config: RunConfig) -> int:
        """Return how many of the first `steps` steps of `stage` have updated the states of a trained weight."""
        return steps

    def adapter_targets(self, layer: int, stage: Stage, config: RunConfig) -> Sequence[Target]:
        """Return the linears that get adapters in the old layer with the index `layer`."""
        return config.adapter.targets if self.adds_adapters else ()

    def keeps_adapters(self, config: RunConfig) -> bool:
        """Return whether adapters stay when the model grows. Otherwise growth merges them into their weights."""
        return False

    def change_interval(self, config: RunConfig) -> int:
        """Return the number of steps between changes of old layers in a stage; 0 if there are no changes."""
        return 0

    def rewarms(self, config: RunConfig) -> bool:
        """Return whether the learning rate warms up again after a change."""
        return True

    def problem(self, stage: Stage, config: RunConfig) -> str | None:
        """Return why the policy cannot treat the old layers of `stage`, and what to do; None if it can."""
        return None

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


class Rotate(Policy):
    """Trains a share of each pipeline rank's old layers in each turn. The others rest: only their norms are trained."""

    name = "rotate"
    effect = "old layers are trained in turn"
    interval_key = "old_layers.turn_steps"

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Train the norms and, in the layers that `turn` trains, all other weights."""
        layer, keeps = layer_of(key), config.old_layers.moments == "keep"
        born = stage.layers[layer].born
        if is_norm(key):
            return Treatment(not config.freeze.norms, "base", born)
        rotation, number = _place_in_rotation(layer, stage, config)
        active = rotation.is_active(number, turn)
        return Treatment(active, "base", born if keeps else stage.index, rests=keeps and not active)

    def period(self, config: RunConfig) -> int:
        """Return a number of layers of which nearly `active_share` are trained."""
        return _share(config).limit_denominator(20).denominator

    def num_turns(self, stage: Stage, config: RunConfig) -> int:
        """Return the turns of the longest cycle of a pipeline rank, or of the stage if it has fewer."""
        in_stage = -(-stage.num_steps // config.old_layers.turn_steps)
        cycles = [_rotation(number, stage, config).num_shifts for number in range(len(stage.turn_groups))]
        return max(1, min(in_stage, max(cycles)))

    def updates(self, key: str, steps: int, stage: Stage, config: RunConfig) -> int:
        """Return the steps of the layer's turns; with `moments: reset` those since it was last at rest."""
        if is_norm(key):
            return steps
        rotation, number = _place_in_rotation(layer_of(key), stage, config)
        if config.old_layers.moments == "keep":
            return rotation.active_steps(number, steps)
        return rotation.steps_in_a_row(number, steps, turn_at(stage.first_step + steps, stage, config))

    def change_interval(self, config: RunConfig) -> int:
        """Return the steps of a turn."""
        return config.old_layers.turn_steps

    def rewarms(self, config: RunConfig) -> bool:
        """Return whether moments start at zero after a change."""
        return config.old_layers.moments == "reset"

    def problem(self, stage: Stage, config: RunConfig) -> str | None:
        """Return a line if a turn is longer than the stage, or if the share leaves a pipeline rank without layers."""
        turn_steps, share = config.old_layers.turn_steps, config.old_layers.active_share
        if stage.num_steps == 0:
            return None
        if turn_steps > stage.num_steps:
            return (
                f"old_layers.turn_steps {turn_steps} is more than the {counted(stage.num_steps, 'step')} of stage "
                f"{stage.number}: the layers that rest first would never be trained. Set old_layers.turn_steps to less "
                f"than {stage.num_steps}"
            )
        fewest = min(map(len, stage.turn_groups))
        if _num_active(fewest, config) == 0:
            return (
                f"old_layers.active_share {share} of the {counted(fewest, 'old layer')} that a pipeline rank has in "
                f"stage {stage.number} rounds to no layer: use a share of at least {1 / (2 * fewest):.2g}, or fewer "
                "pipeline ranks"
            )
        return None


def _place_in_rotation(layer: int, stage: Stage, config: RunConfig) -> tuple[Rotation, int]:
    """Return the rotation that an old layer takes part in, and its number there."""
    ((number, group),) = [(number, group) for number, group in enumerate(stage.turn_groups) if layer in group]
    return _rotation(number, stage, config), group.index(layer)


def _rotation(number: int, stage: Stage, config: RunConfig) -> Rotation:
    """Return the rotation over the group with the number `number` of the stage's old layers."""
    num_layers, random = len(stage.turn_groups[number]), config.old_layers.order == "random"
    seed = f"{config.training.seed}/{stage.index}/{number}" if random else None
    return Rotation(num_layers, _num_active(num_layers, config), config.old_layers.turn_steps, seed)


def _num_active(num_layers: int, config: RunConfig) -> int:
    """Return active_share of `num_layers`, rounded to whole layers, halves up."""
    return floor(_share(config) * num_layers + Fraction(1, 2))


def _share(config: RunConfig) -> Fraction:
    """Return active_share as it is written, so that 0.15 of 10 layers are exactly 1.5."""
    return Fraction(str(config.old_layers.active_share))


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


def since_rewarm(step: int, stage: Stage, config: RunConfig) -> int:
    """Return the steps since the learning rate began to warm up in `stage`, when the run has finished `step` steps."""
    rewarms = stage.index > 0 and policy_of(config).rewarms(config)
    return since_change(step, stage, config) if rewarms else step - stage.first_step


def turn_at(step: int, stage: Stage, config: RunConfig) -> int:
    """Return the number of changes in `stage` until the run has finished `step` steps."""
    interval = _interval(stage, config)
    last = min(step, stage.last_step - 1)  # no change happens at the stage's end
    return max(0, last - stage.first_step) // interval if interval else 0


def _interval(stage: Stage, config: RunConfig) -> int:
    return policy_of(config).change_interval(config) if stage.index > 0 else 0


for _policy in (Frozen(), Adapters(), Rotate(), Trained()):
    register(_policy)

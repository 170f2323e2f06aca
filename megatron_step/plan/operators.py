"""Growth operators: for each layer of the larger model, the layers of the smaller model that it starts from.

operator      places of the new layers                                         keeps the function with init
interpolate   between old layers: one in each gap from `position` on,           identity
              then a second one in each, and so on
stack         the whole model again on top of itself (G_stack)                  identity

init          weights of a new layer                                            sources
mean          element-wise mean of the old layers below and above the new one   both
copy          weights of the old layer below (stack: of the repeated layer)     that layer
identity      as copy, with output projections of attention and MLP set to 0    that layer
random        drawn at random, scaled for the new depth                         none

A user's own operator is a subclass of `Operator`; `register` makes its name a value of growth.operator.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_step.config.counts import counted
from megatron_step.config.numbers import nearest
from megatron_step.config.stages import GrowthConfig


@dataclass(frozen=True)
class GrownLayer:
    """A layer of a stage's model."""

    sources: tuple[int, ...]
    """Layers of the stage before, bottom up from 0, whose mean gives the layer's first weights; none for random
    weights. In the first stage, these are layers of the checkpoint that the run starts from."""
    born: int
    """Index of the stage that added the layer."""


@dataclass(frozen=True)
class Old:
    """The place of an old layer in the grown model."""

    layer: int
    """Index of the layer in the smaller model, bottom up from 0."""


@dataclass(frozen=True)
class New:
    """The place of a new layer in the grown model."""

    copied: int
    """Index of the old layer whose weights the new layer copies."""
    upper: int | None = None
    """Index of the old layer that growth.init mean averages with `copied`; None to copy `copied` alone."""


@dataclass(frozen=True)
class Init:
    """A rule for the first weights of a new layer."""

    sources: Callable[[New], tuple[int, ...]]
    """Function that returns the old layers whose mean gives the weights; none for random weights."""
    zero_outputs: bool = False
    """Whether the layer's two output projections start as zero, so that it adds nothing to the residual stream."""


INITS = {
    "mean": Init(lambda new: (new.copied,) if new.upper is None else (new.copied, new.upper)),
    "copy": Init(lambda new: (new.copied,)),
    "identity": Init(lambda new: (new.copied,), zero_outputs=True),
    "random": Init(lambda new: ()),
}
"""Values of growth.init."""


class Operator(ABC):
    """A rule that places new layers among the old ones."""

    name: str
    """The operator's value of growth.operator."""
    inits: tuple[str, ...] = tuple(INITS)
    """Values of growth.init that the operator accepts."""
    adds: str = "any number of layers"
    """What `can_add` allows, in words, for errors."""
    only_inserts: bool = False
    """Whether adding one more layer only inserts a layer and keeps the order of all others. Then the planner's bound
    for a stage also bounds stages that add more layers. False is always safe, but planning is slower."""

    @abstractmethod
    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> Sequence[Old | New]:
        """Return the layers of the grown model, bottom up: each of `num_layers` old ones once, and `num_new` new ones.

        `seed` decides random choices.
        """

    def can_add(self, num_layers: int, num_new: int) -> bool:
        """Return whether the operator can add `num_new` layers to a model of `num_layers`."""
        return True

    def preserves_function(self, growth: GrowthConfig) -> bool:
        """Return whether the grown model computes the same function as the smaller one.

        The default holds for operators that keep the order of old layers: it is True if new layers add nothing.
        """
        return INITS[growth.init].zero_outputs

    def describe(self, growth: GrowthConfig) -> str:
        """Return the settings that the operator uses, for people."""
        return f"{self.name}, {growth.init}"


class Interpolate(Operator):
    """Puts new layers between old ones (Chang et al., 2018)."""

    name = "interpolate"
    only_inserts = True

    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> Sequence[Old | New]:
        """Put one new layer into each gap from growth.position on, then a second one into each, and so on."""
        added = [0] * num_layers  # new layers right above each old one
        order = _gap_order(num_layers, growth.position, seed + num_layers)
        for index in range(num_new):
            added[order[index % len(order)]] += 1
        places: list[Old | New] = []
        for layer in range(num_layers):
            places.append(Old(layer))
            places += [New(layer, layer + 1 if layer + 1 < num_layers else None)] * added[layer]
        return places

    def describe(self, growth: GrowthConfig) -> str:
        """Return the operator's name, the position and the init."""
        return f"{self.name}, {growth.position}, {growth.init}"


class Stack(Operator):
    """Repeats the whole model on top of itself (G_stack, Du et al., 2024)."""

    name = "stack"
    inits = ("copy", "identity", "random")
    adds = "whole repetitions of the model"
    only_inserts = True

    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> Sequence[Old | New]:
        """Return the old layers, then a new layer for each of them in the same order."""
        return [*map(Old, range(num_layers)), *(New(index % num_layers) for index in range(num_new))]

    def can_add(self, num_layers: int, num_new: int) -> bool:
        """Return whether `num_new` is a multiple of `num_layers`."""
        return num_new % num_layers == 0


_OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    """Make `operator` a value of growth.operator.

    Raises ValueError if another operator has this name, or if `operator` accepts an unknown init.
    """
    if unknown := [init for init in operator.inits if init not in INITS]:
        raise ValueError(
            f"growth operator {operator.name} accepts the inits {unknown}, which do not exist: choose some of "
            f"{list(INITS)}"
        )
    known = _OPERATORS.setdefault(operator.name, operator)
    if type(known) is not type(operator):
        raise ValueError(f"a growth operator called {operator.name} already exists: choose another name")


def operator_of(growth: GrowthConfig) -> Operator:
    """Return the operator that growth.operator names.

    Raises ValueError if no operator has that name, or if the operator does not accept growth.init.
    """
    operator = _OPERATORS.get(growth.operator)
    if operator is None:
        raise ValueError(
            f"growth.operator {growth.operator} is not registered: choose {_either(list(_OPERATORS))}, or add the "
            "module that registers it to plugins"
        )
    if growth.init not in operator.inits:
        raise ValueError(
            f"growth.operator {operator.name} does not work with growth.init {growth.init}: choose "
            f"{_either(operator.inits)}"
        )
    return operator


def describe_growth(growth: GrowthConfig) -> str:
    """Return the settings of growth, for people; also if the operator is not registered in this process."""
    if growth.operator not in _OPERATORS:
        return f"{growth.operator}, {growth.init}"
    return _OPERATORS[growth.operator].describe(growth)


def first_layers(num_layers: int, start_from_checkpoint: bool) -> tuple[GrownLayer, ...]:
    """Return the layers of the first stage, bottom up: with random weights, or from a checkpoint."""
    return tuple(GrownLayer((index,) if start_from_checkpoint else (), born=0) for index in range(num_layers))


def grow(
    layers: Sequence[GrownLayer], num_new: int, stage_index: int, growth: GrowthConfig, seed: int
) -> tuple[GrownLayer, ...]:
    """Return the layers, bottom up, of stage `stage_index`, which adds `num_new` to the `layers` of the stage before.

    `seed` decides random positions. An old layer has itself as its only source.

    Raises ValueError if the operator cannot add `num_new` layers, or does not place every old and new layer once.
    """
    operator = operator_of(growth)
    if not operator.can_add(len(layers), num_new):
        possible, number = nearest(num_new, partial(operator.can_add, len(layers))), stage_index + 1
        raise ValueError(
            f"growth.operator {operator.name} adds {operator.adds}: it cannot add {counted(num_new, 'layer')} to "
            f"{len(layers)}. Let stage {number} add {' or '.join(map(str, possible)) or 'none'} in "
            "stages.layers"
        )
    places = operator.places(len(layers), num_new, growth, seed)
    kept = sorted(place.layer for place in places if isinstance(place, Old))
    if kept != list(range(len(layers))) or len(places) != len(layers) + num_new:
        raise ValueError(
            f"growth.operator {operator.name} placed the old layers {kept} and "
            f"{counted(len(places) - len(kept), 'new layer')}: it must place each of the "
            f"{counted(len(layers), 'old layer')} once, and add {counted(num_new, 'new layer')}"
        )
    grown = []
    for place in places:
        if isinstance(place, Old):
            grown.append(GrownLayer((place.layer,), layers[place.layer].born))
        else:
            grown.append(GrownLayer(INITS[growth.init].sources(place), stage_index))
    return tuple(grown)


def _gap_order(num_layers: int, position: str, seed: int) -> Sequence[int]:
    """Return the gaps in the order of their use. A gap is named by the old layer below it.

    A gap lies between two old layers; a model of one layer has only the gap above it.
    """
    gaps = list(range(max(1, num_layers - 1)))
    if position == "upper":
        return gaps[::-1]
    if position == "intermediate":
        middle = (len(gaps) - 1) / 2
        return sorted(gaps, key=lambda gap: (abs(gap - middle), -gap))
    if position == "random":
        random.Random(seed).shuffle(gaps)
    return gaps


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


register(Interpolate())
register(Stack())

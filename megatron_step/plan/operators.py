"""Growth operators: for each layer of the larger model, the layers of the smaller one that it comes from.

operator      where new layers come                                            keeps the function with init
interpolate   between old layers: one in each gap from `position` on,           identity
              then a second one in each, and so on
stack         the whole model again on top of itself (G_stack)                  identity

init          weights of a new layer                                            sources
mean          element-wise mean of the old layers below and above it            both
copy          those of the old layer below it (stack: of the layer it repeats)  that one
identity      the copy with the attention's and the MLP's output projection 0   that one
random        drawn at random, scaled for the new depth                              none

An operator of a user's own is a subclass of `Operator`; `register` makes its name a value of growth.operator.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_step.config.numbers import nearest
from megatron_step.config.stages import GrowthConfig


@dataclass(frozen=True)
class GrownLayer:
    """A layer of a stage's model."""

    sources: tuple[int, ...]
    """Layers of the stage before, bottom up from 0, whose mean its weights begin as; none for random weights. Of the
    first stage, layers of the checkpoint that the run starts from."""
    born: int
    """Index of the stage that added it."""


@dataclass(frozen=True)
class Old:
    """The place of an old layer in the grown model."""

    layer: int
    """Its number in the smaller model, bottom up from 0."""


@dataclass(frozen=True)
class New:
    """The place of a new layer in the grown model."""

    copied: int
    """The old layer that it begins as, where growth.init makes copies."""
    upper: int | None = None
    """The old layer whose mean with `copied` it begins as, where growth.init is mean; None for the copy alone."""


@dataclass(frozen=True)
class Init:
    """Weights of a new layer."""

    sources: Callable[[New], tuple[int, ...]]
    """Old layers whose mean it begins as; none for random weights."""
    zero_outputs: bool = False
    """Whether its two output projections begin as zero, so that it adds nothing to the residual stream."""


INITS = {
    "mean": Init(lambda new: (new.copied,) if new.upper is None else (new.copied, new.upper)),
    "copy": Init(lambda new: (new.copied,)),
    "identity": Init(lambda new: (new.copied,), zero_outputs=True),
    "random": Init(lambda new: ()),
}
"""Values of growth.init."""


class Operator(ABC):
    """Where new layers come."""

    name: str
    """Its value of growth.operator."""
    inits: tuple[str, ...] = tuple(INITS)
    """Values of growth.init that it takes."""
    adds: str = "any number of layers"
    """What `can_add` allows, in words, for errors."""
    only_inserts: bool = False
    """Whether a model grown by one layer more has the same layers and one put in among them. What the planner proves
    for a stage then bounds the stages that add more layers. False is always safe, and slower."""

    @abstractmethod
    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> Sequence[Old | New]:
        """The grown model's layers, bottom up: `num_layers` old ones, each once, and `num_new` new ones.

        `seed` decides random choices.
        """

    def can_add(self, num_layers: int, num_new: int) -> bool:
        """Whether it can add `num_new` layers to `num_layers`."""
        return True

    def preserves_function(self, growth: GrowthConfig) -> bool:
        """Whether the grown model computes what the smaller one did: here, as for every operator that keeps the order
        of old layers, if a new layer adds nothing."""
        return INITS[growth.init].zero_outputs

    def describe(self, growth: GrowthConfig) -> str:
        """The settings that it uses, for people."""
        return f"{self.name}, {growth.init}"


class Interpolate(Operator):
    """New layers between old ones (Chang et al., 2018)."""

    name = "interpolate"
    only_inserts = True

    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> Sequence[Old | New]:
        """One new layer in each gap from growth.position on, then a second one in each, and so on."""
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
        """Its name, the position and the init."""
        return f"{self.name}, {growth.position}, {growth.init}"


class Stack(Operator):
    """The whole model again on top of itself (G_stack, Du et al., 2024)."""

    name = "stack"
    inits = ("copy", "identity", "random")
    adds = "whole repetitions of the model"
    only_inserts = True

    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> Sequence[Old | New]:
        """The old layers, then each again in their order."""
        return [*map(Old, range(num_layers)), *(New(index % num_layers) for index in range(num_new))]

    def can_add(self, num_layers: int, num_new: int) -> bool:
        """Whether it is a multiple of the layers."""
        return num_new % num_layers == 0


_OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    """Make `operator` a value of growth.operator.

    Raises ValueError if another one has its name, or it takes an init that does not exist.
    """
    if unknown := [init for init in operator.inits if init not in INITS]:
        raise ValueError(f"operator {operator.name} takes the inits {unknown}, which are not among {list(INITS)}")
    known = _OPERATORS.setdefault(operator.name, operator)
    if type(known) is not type(operator):
        raise ValueError(f"a growth operator called {operator.name} already exists: choose another name")


def operator_of(growth: GrowthConfig) -> Operator:
    """The operator that growth.operator names.

    Raises ValueError if none has that name, or it does not take growth.init.
    """
    operator = _OPERATORS.get(growth.operator)
    if operator is None:
        raise ValueError(
            f"growth.operator {growth.operator} is not registered: choose {_either(list(_OPERATORS))}, or import the "
            "module that registers it"
        )
    if growth.init not in operator.inits:
        raise ValueError(
            f"growth.operator {operator.name} does not take growth.init {growth.init}: choose {_either(operator.inits)}"
        )
    return operator


def describe_growth(growth: GrowthConfig) -> str:
    """The settings of growth, for people; also where the operator of another machine is not registered here."""
    if growth.operator not in _OPERATORS:
        return f"{growth.operator}, {growth.init}"
    return _OPERATORS[growth.operator].describe(growth)


def first_layers(num_layers: int, start_from_checkpoint: bool) -> tuple[GrownLayer, ...]:
    """The layers, bottom up, of the first stage: random, or those of a checkpoint."""
    return tuple(GrownLayer((index,) if start_from_checkpoint else (), born=0) for index in range(num_layers))


def grow(
    layers: Sequence[GrownLayer], num_new: int, stage_index: int, growth: GrowthConfig, seed: int
) -> tuple[GrownLayer, ...]:
    """The layers, bottom up, of stage `stage_index`, which adds `num_new` to the `layers` of the stage before.

    `seed` decides random positions. A layer that is kept has itself as its only source.

    Raises ValueError if the operator cannot add so many, or does not place every old and new layer once.
    """
    operator = operator_of(growth)
    if not operator.can_add(len(layers), num_new):
        possible = nearest(num_new, partial(operator.can_add, len(layers)))
        raise ValueError(
            f"growth.operator {operator.name} adds {operator.adds}: it cannot add {num_new} layers to {len(layers)}; "
            f"let that stage add {' or '.join(map(str, possible)) or 'none'} in stages.layers"
        )
    places = operator.places(len(layers), num_new, growth, seed)
    kept = sorted(place.layer for place in places if isinstance(place, Old))
    if kept != list(range(len(layers))) or len(places) != len(layers) + num_new:
        raise ValueError(
            f"growth.operator {operator.name} placed the old layers {kept} and {len(places) - len(kept)} new ones: it "
            f"must place each of {len(layers)} old layers once, and {num_new} new ones"
        )
    grown = []
    for place in places:
        if isinstance(place, Old):
            grown.append(GrownLayer((place.layer,), layers[place.layer].born))
        else:
            grown.append(GrownLayer(INITS[growth.init].sources(place), stage_index))
    return tuple(grown)


def _gap_order(num_layers: int, position: str, seed: int) -> Sequence[int]:
    """Old layers above which new ones come, in the order in which these gaps are used.

    A gap lies between two old layers; a model of one layer has only the place above it.
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

"""Growth operators as pure maps: for each layer of the larger model, the layers of the smaller one that it comes from.

operator      where new layers come                                            keeps the function with init
interpolate   between old layers: one in each gap from `position` on,           identity
              then a second one in each, and so on
stack         the whole model again on top of itself (G_stack)                  identity

init          weights of a new layer                                            sources
mean          element-wise mean of the old layers below and above it            both
copy          those of the old layer below it (stack: of the layer it repeats)  that one
identity      the copy with the attention's and the MLP's output projection 0   that one
random        drawn anew, scaled for the new depth                              none
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_step.config.numbers import nearest
from megatron_step.config.stages import GrowthConfig


@dataclass(frozen=True)
class GrownLayer:
    """A layer of a stage's model."""

    sources: tuple[int, ...]
    """Layers of the stage before, bottom up from 0, whose mean its weights begin as; none for random weights. Of the
    first stage, layers of the checkpoint that the run starts from."""
    born: int
    """The stage that added it."""


def first_layers(num_layers: int, start_from_checkpoint: bool) -> tuple[GrownLayer, ...]:
    """The layers, bottom up, of the first stage: random, or those of a checkpoint."""
    return tuple(GrownLayer((index,) if start_from_checkpoint else (), born=0) for index in range(num_layers))


def grow(
    layers: Sequence[GrownLayer], num_new: int, stage_index: int, growth: GrowthConfig, seed: int
) -> tuple[GrownLayer, ...]:
    """The layers, bottom up, of stage `stage_index`, which adds `num_new` to the `layers` of the stage before.

    `seed` decides random positions. A layer that is kept has itself as its only source.

    Raises ValueError if `stack` is to add layers that are not whole repetitions of the model.
    """
    if growth.operator == "stack":
        sources = _stack(len(layers), num_new, growth.init)
    else:
        sources = _interpolate(len(layers), num_new, growth, seed)
    return tuple(GrownLayer(of, stage_index if is_new else layers[of[0]].born) for of, is_new in sources)


def preserves_function(growth: GrowthConfig) -> bool:
    """Whether the grown model computes what the smaller one did."""
    return growth.init == "identity"


_Sources = tuple[tuple[int, ...], bool]
"""Sources of a layer, and whether it is new."""


def _stack(num_layers: int, num_new: int, init: str) -> list[_Sources]:
    if num_new % num_layers:
        raise ValueError(
            f"growth.operator stack repeats the whole model: it cannot add {num_new} layers to {num_layers}; "
            f"let that stage add {' or '.join(map(str, nearest(num_new, lambda count: count % num_layers == 0)))} in "
            "stages.layers"
        )
    kept: list[_Sources] = [((index,), False) for index in range(num_layers)]
    return kept + [(_sources(init, index % num_layers, None), True) for index in range(num_new)]


def _interpolate(num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> list[_Sources]:
    added = [0] * num_layers  # new layers right above each old one
    order = _gap_order(num_layers, growth.position, seed + num_layers)
    for index in range(num_new):
        added[order[index % len(order)]] += 1
    layers: list[_Sources] = []
    for below in range(num_layers):
        above = below + 1 if below + 1 < num_layers else None
        layers.append(((below,), False))
        layers += [(_sources(growth.init, below, above), True)] * added[below]
    return layers


def _sources(init: str, below: int, above: int | None) -> tuple[int, ...]:
    if init == "random":
        return ()
    if init == "mean" and above is not None:
        return (below, above)
    return (below,)


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

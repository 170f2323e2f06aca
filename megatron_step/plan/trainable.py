"""What a stage trains: for each weight, by its key in checkpoints, whether it is trained and since when.

    weight                                 after growth                       moments since
    embedding, output layer, final norm    trained, unless freeze.*           the first stage
    new layers                             trained                            this stage
    old layers: matrices and biases        frozen, unless not freeze.layers   the stage that added the layer
    old layers: norms                      trained, unless freeze.norms       the stage that added the layer
    adapters of old layers                 trained                            this stage; with adapter.at_stage_end
                                                                              keep, the one after the layer's

In the first stage all is trained.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_step.config.run import RunConfig
from megatron_step.plan.names import is_adapter, is_embedding, is_norm, is_output_layer, layer_of
from megatron_step.plan.stages import Stage

Role = Literal["base", "embedding", "new_layer", "adapter"]
"""What a weight is to the optimizer: each role but `base` has its own learning rate."""


@dataclass(frozen=True)
class Treatment:
    """What a stage does with a weight."""

    trained: bool
    """Whether it has a gradient and optimizer states; a weight that has not is frozen."""
    role: Role
    """What it is to the optimizer."""
    since: int
    """The stage in which its optimizer states began."""


def treatment(key: str, stage: Stage, config: RunConfig) -> Treatment:
    """What `stage` does with the weight that checkpoints call `key`."""
    freeze, grown = config.freeze, stage.index > 0
    if is_embedding(key):
        return Treatment(not (grown and freeze.embedding), "embedding", 0)
    if is_output_layer(key):
        return Treatment(not (grown and freeze.output_layer), "embedding", 0)
    if layer_of(key) < 0:
        return Treatment(not (grown and freeze.final_norm), "base", 0)
    born = stage.layers[layer_of(key)].born
    if is_adapter(key):
        return Treatment(True, "adapter", born + 1 if config.adapter.at_stage_end == "keep" else stage.index)
    if born == stage.index:
        return Treatment(True, "new_layer" if grown else "base", born)
    return Treatment(not (freeze.norms if is_norm(key) else freeze.layers), "base", born)


def has_adapters(layer: int, stage: Stage, config: RunConfig) -> bool:
    """Whether the linears of a layer have adapters: it is frozen, and adapters are asked for."""
    return config.freeze.layers and config.adapter.rank > 0 and stage.layers[layer].born < stage.index

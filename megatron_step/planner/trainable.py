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
from megatron_step.planner.stages import Stage

Role = Literal["base", "embedding", "new_layer", "adapter"]
"""What a weight is to the optimizer: each role but `base` has a learning rate of its own."""

_LAYERS = "decoder.layers."


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
    if key.startswith("embedding."):
        return Treatment(not (grown and freeze.embedding), "embedding", 0)
    if key.startswith("output_layer."):
        return Treatment(not (grown and freeze.output_layer), "embedding", 0)
    if not key.startswith(_LAYERS):
        return Treatment(not (grown and freeze.final_norm), "base", 0)
    born = stage.layers[layer_of(key)].born
    if is_adapter(key):
        return Treatment(True, "adapter", born + 1 if config.adapter.at_stage_end == "keep" else stage.index)
    if born == stage.index:
        return Treatment(True, "new_layer" if grown else "base", born)
    return Treatment(not (freeze.norms if _is_norm(key) else freeze.layers), "base", born)


def has_adapters(layer: int, stage: Stage, config: RunConfig) -> bool:
    """Whether the linears of a layer have adapters: it is frozen, and adapters are asked for."""
    return config.freeze.layers and config.adapter.rank > 0 and stage.layers[layer].born < stage.index


def layer_of(key: str) -> int:
    """Number of the layer, bottom up from 0, that a weight belongs to; -1 for a weight outside the layers."""
    return int(key[len(_LAYERS) :].partition(".")[0]) if key.startswith(_LAYERS) else -1


def layer_key(layer: int, name: str) -> str:
    """The key of a layer's weight, which is called `name` within the layer."""
    return f"{_LAYERS}{layer}.{name}"


def in_layer(key: str, layer: int) -> str:
    """The key of the same weight in another layer."""
    return layer_key(layer, key[len(_LAYERS) :].partition(".")[2])


def is_adapter(key: str) -> bool:
    """Whether a weight is an adapter's."""
    return ".adapter." in key


def _is_norm(key: str) -> bool:
    # A layer's two norms are called as TransformerEngine's fused norm-linears call them.
    return key.endswith(("layer_norm_weight", "layernorm.weight"))

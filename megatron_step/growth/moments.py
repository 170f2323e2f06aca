"""Carry a checkpoint's optimizer states into the next stage.

If a weight stays trained, its states are read under the key that it had in the stage before. The states of new weights
stay zero. The states of weights that become frozen are not read.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_step.checkpoint.states import load_states
from megatron_step.engine.parallel import Parallel
from megatron_step.growth.turns import turns
from megatron_step.model.build import Sharded, sharded_weights
from megatron_step.plan.names import in_layer, layer_of
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import Recipe


def grow_moments(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    stage: Stage,
    saved: Recipe,
    recipe: Recipe,
    parallel: Parallel,
) -> None:
    """Load the states of the weights that `stage` continues to train, in place, from a checkpoint of any layout.

    The checkpoint has states by the recipe `saved`, the optimizer by `recipe`.

    Raises ValueError if the checkpoint in `path` lacks a state, or has another shape of it.
    """
    for _, weights in turns(sharded_weights(chunks, parallel), stage, parallel):
        carried = {
            name: replace(shard, key=_key_before(shard.key, stage))
            for name, shard in weights.items()
            if _goes_on(shard, stage)
        }
        # Data-parallel ranks without the distributed optimizer ask for the same parts.
        load_states(path, optimizer, carried, saved, recipe, parallel, shared=True)


def _goes_on(shard: Sharded, stage: Stage) -> bool:
    """Return whether the previous stage trained the weight, too."""
    return shard.data.requires_grad and shard.data.since < stage.index


def _key_before(key: str, stage: Stage) -> str:
    layer = layer_of(key)
    return key if layer < 0 else in_layer(key, stage.layers[layer].sources[0])

"""Carry a checkpoint's optimizer states into the next stage.

If a weight stays trained, or rests until its turn, its states are read under the key that it had in the stage before.
The states of new weights stay zero. The states of weights that become frozen are not read.
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
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import Recipe
from megatron_step.plan.trainable import key_before


def grow_moments(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    stage: Stage,
    saved: Recipe,
    recipe: Recipe,
    parallel: Parallel,
) -> None:
    """Load the states of the weights that `stage` trains on or lets rest, in place, from a checkpoint of any layout.

    The checkpoint has states by the recipe `saved`, the optimizer by `recipe`.

    Raises ValueError if the checkpoint in `path` lacks a state, or has another shape of it.
    """
    for _, weights in turns(sharded_weights(chunks, parallel), stage, parallel):
        carried = {
            name: replace(shard, key=key_before(shard.key, stage))
            for name, shard in weights.items()
            if _goes_on(shard, stage)
        }
        # Data-parallel ranks without the distributed optimizer ask for the same parts.
        load_states(path, optimizer, carried, saved, recipe, parallel, shared=True)


def _goes_on(shard: Sharded, stage: Stage) -> bool:
    """Return whether the weight has states, which an earlier stage created."""
    return (shard.data.requires_grad or shard.data.rests) and shard.data.since < stage.index

"""Restarts adapters: merges them, draws fresh ones and prunes their optimizer states (ReLoRA, Lialin et al., 2023)."""

import torch

from megatron_step.adapters.restart import restart_adapters
from megatron_step.checkpoint.sharding import own_states, set_optimizer_state, sharded_weights
from megatron_step.config.run import RunConfig
from megatron_step.engine.formats import decode
from megatron_step.engine.parallel import Parallel
from megatron_step.optim.prune import prune_moments
from megatron_step.plan.states import FIRST_MOMENT, MAIN_WEIGHT, SECOND_MOMENT, training_recipe
from megatron_step.training.state import TrainState


def restart(state: TrainState, config: RunConfig, parallel: Parallel) -> float:
    """Merge and restart the adapters and prune their moments; return the share of moments that are then zero."""
    seed = config.training.seed + state.step  # other values than any adapter before
    restart_adapters(state.chunks, config.model, parallel, seed)
    weights = {
        name: shard for name, shard in sharded_weights(state.chunks, parallel).items() if shard.data.role == "adapter"
    }
    if training_recipe(config).main:
        fresh = {name: decode(shard.data.detach()) for name, shard in weights.items()}
        set_optimizer_state(state.optimizer, weights, MAIN_WEIGHT, fresh)
    nothing = torch.empty(0, device=parallel.device)
    states = [own_states(state.optimizer, shard.data) for shard in weights.values()]
    moments = [(own.get(FIRST_MOMENT, nothing), own.get(SECOND_MOMENT, nothing)) for own in states]
    groups = [parallel.groups.tp, *([parallel.groups.dp_cp] if config.parallel.distributed_optimizer else [])]
    return prune_moments(moments, config.adapter.restart_prune, groups)

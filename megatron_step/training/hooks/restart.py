"""Restart adapters: merge them, draw fresh ones and prune their optimizer states (ReLoRA, Lialin et al., 2023)."""

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_step.adapters.restart import restart_adapters
from megatron_step.checkpoint.sharding import reset_main_weights
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import sharded_weights
from megatron_step.optim.compact import CompactAdamW
from megatron_step.optim.decoded import decode_moment
from megatron_step.optim.owned import owned
from megatron_step.optim.prune import prune_moments
from megatron_step.plan.states import FIRST_MOMENT, MOMENTS
from megatron_step.training.state import TrainState


def restart(state: TrainState, config: RunConfig, parallel: Parallel) -> float:
    """Merge and restart the adapters and prune their moments; return the share of moments that are then zero."""
    seed = config.training.seed + state.step  # a new seed, so that new adapters differ from all earlier ones
    restart_adapters(state.chunks, config.model, parallel, seed)
    weights = {
        name: shard for name, shard in sharded_weights(state.chunks, parallel).items() if shard.data.role == "adapter"
    }
    assert state.optimizer is not None
    reset_main_weights(state.optimizer, weights)
    moments = [_moments(state.optimizer, shard.data, parallel.device) for shard in weights.values()]
    groups = [parallel.groups.tp, *([parallel.groups.dp_cp] if config.parallel.distributed_optimizer else [])]
    return prune_moments(moments, config.adapter.restart_prune, groups)


def _moments(optimizer: MegatronOptimizer, param: Tensor, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """This rank's part of a weight's first moments in fp32, and of both moments as they are stored."""
    own = owned(optimizer, param)
    if own is None:
        nothing = torch.empty(0, device=device)
        return nothing, [nothing, nothing]
    stored = [own.states[name] for name in MOMENTS]
    pieces = own.inner.pieces_of(own.updated) if isinstance(own.inner, CompactAdamW) else []
    return decode_moment(FIRST_MOMENT, own.states, pieces), stored

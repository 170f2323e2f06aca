"""megatron-core's data parallelism and optimizer over the trainable weights of a model."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.transformer.module import MegatronModule

from megatron_step.config.model import ModelConfig
from megatron_step.config.optimization import OptimizerConfig, Rule
from megatron_step.engine.compat.operations import foreach_mul_
from megatron_step.engine.compat.optimizers import adam_class, compact_class, separate_gradients
from megatron_step.engine.formats import tensor_type
from megatron_step.engine.gradient_types import keep_gradient_type
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import sharded_weights
from megatron_step.optim.adam import FusedAdam
from megatron_step.optim.compact import CompactAdamW
from megatron_step.optim.initial_states import inner_parts, make_states
from megatron_step.plan.matrices import rule_of
from megatron_step.plan.old_layers import Role
from megatron_step.plan.states import BF16, FP32, Recipe

_Kind: TypeAlias = tuple[str, int, Rule]
"""Role of a weight in the optimizer, the stage in which its moments began, and the rule that trains it."""

_ROW = 512
"""Squares that are added in fp32."""
_ROWS_AT_ONCE = 2048


def wrap_data_parallel(
    chunks: list[MegatronModule], recipe: Recipe, parallel: Parallel
) -> list[DistributedDataParallel]:
    """Give the trainable weights of every model chunk gradient buffers that are averaged over data-parallel ranks.

    What is trainable is fixed here: a weight that is unfrozen later would never be updated. A gradient reaches its
    buffer in the activations' type, if that is wider than the weight's.
    """
    overlap = parallel.config.overlap_grad_reduce and parallel.dp_size > 1
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.gradient == FP32,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=parallel.config.distributed_optimizer,
    )
    for chunk in chunks:
        for weight in chunk.parameters():
            if weight.requires_grad:
                keep_gradient_type(weight, chunk.config.pipeline_dtype)
    wrap = DistributedDataParallel if parallel.dp_size > 1 else _SingleReplica
    wrapped = [
        # Only the first chunk's gradients are reduced in several buckets: the others have time to hide one.
        wrap(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if overlap:
        no_sync = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


class _SingleReplica(DistributedDataParallel):
    """The only data-parallel rank: its gradients are the average, its weights complete.

    megatron-core runs its collectives over this one rank too, and gloo copies every gradient and weight in them.
    """

    def start_grad_sync(self, *unused: Any) -> None:
        """There is nothing to reduce."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """There is nothing to wait for."""

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """There is nothing to gather."""


def build_optimizer(
    config: OptimizerConfig,
    model: ModelConfig,
    chunks: list[DistributedDataParallel],
    recipe: Recipe,
    parallel: Parallel,
    seed: int,
) -> MegatronOptimizer:
    """Build the optimizer over the trainable weights of the wrapped chunks: AdamW, or Muon with AdamW by the recipe's
    rule. Norms and biases do not decay.

    `seed`, the same on all ranks, is that of stochastic rounding where the recipe has it.

    Weights with another `role` (their learning rate may differ) or `since` (Adam has seen another number of their
    gradients) are in separate groups, and so are those that Muon trains. Its moments exist when it returns, so that
    what it needs is allocated before the first step.
    """
    distributed = chunks[0].ddp_config.use_distributed_optimizer
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        # The norm is always computed, for the log; an infinite limit never scales.
        clip_grad=config.clip_grad if config.clip_grad > 0 else float("inf"),
        # megatron-core makes main weights for bf16 without the distributed optimizer.
        bf16=recipe.weight == BF16 and (distributed or not recipe.is_compact),
        params_dtype=tensor_type(recipe.weight),
        use_distributed_optimizer=distributed,
    )
    if recipe.is_compact:
        settings = separate_gradients(settings)
    own_class = adam_class(FusedAdam, always=recipe.rule == "muon")
    with compact_class(CompactAdamW) if recipe.is_compact else own_class:
        optimizer = megatron_optimizer.get_megatron_optimizer(
            settings, chunks, config_overrides=_group_overrides(chunks, recipe, parallel)
        )
    make_states(optimizer, chunks, model, config.momentum, recipe, parallel, seed)
    return optimizer


def _group_overrides(
    chunks: list[DistributedDataParallel], recipe: Recipe, parallel: Parallel
) -> dict[ParamKey, dict[str, Any]]:
    """Return the rules that sort weights into groups; megatron-core adds the groups of other ranks, empty."""
    overrides: dict[ParamKey, dict[str, Any]] = {
        _where("one_dimensional", lambda param: param.dim() == 1): {"wd_mult": 0.0}
    }
    kinds: dict[_Kind, set[torch.Tensor]] = defaultdict(set)
    for shard in sharded_weights(chunks, parallel).values():
        if shard.data.requires_grad:
            rule = rule_of(shard.key, shard.data.shape, recipe.rule)
            role, since = getattr(shard.data, "role", "base"), getattr(shard.data, "since", 0)
            kinds[role, since, rule].add(shard.data)
    for (role, since, rule), params in kinds.items():
        overrides[_where(f"{role}_{since}_{rule}", params.__contains__)] = {"role": role, "since": since, "rule": rule}
    return overrides


def _where(name: str, condition: Callable[[torch.Tensor], bool]) -> ParamKey:
    return ParamKey(predicate=ParamPredicate(name=name, fn=condition))


def set_learning_rate(
    optimizer: MegatronOptimizer, learning_rate: float, config: OptimizerConfig, warm: Mapping[Role, float]
) -> None:
    """Set the learning rate of every parameter group by its role, and its weight decay where it has one.

    `warm` has the share of its learning rate that a role has while it warms up.
    """
    scales = {
        "base": 1.0,
        "embedding": config.embeddings_scale,
        "new_layer": config.new_layers_scale,
        "adapter": config.adapters_scale,
    }
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * scales[group["role"]] * warm.get(group["role"], 1.0)
        group["weight_decay"] = config.weight_decay * group["wd_mult"]


def set_update_counts(optimizer: MegatronOptimizer, updates: Mapping[int, int]) -> None:
    """Set the count of updates that Adam's moments have seen; `updates` gives it by the stage in which they began."""
    for group in optimizer.param_groups:
        group["step"] = updates[group["since"]]


def gradient_norm(optimizer: MegatronOptimizer, device: torch.device) -> float:
    """Global 2-norm of the gradient over the ranks that share it, whose weights are on `device`.

    megatron-core's get_grad_norm has torch add all squares of a tensor in fp32. On the CPU that norm of 3e7 weights is
    0.2 % too small, and another one for every split of the weights.
    """
    if device.type != "cpu":
        return float(optimizer.get_grad_norm())
    total = torch.zeros((), dtype=torch.float64)
    for part in optimizer.chained_optimizers:
        for grad in part.get_main_grads_for_grad_norm():
            total += square_norm(grad)
    torch.distributed.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return math.sqrt(total)


def square_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all elements, in fp64; as fast as torch's norm and exact to 1e-6 at any size."""
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    # A few rows at a time in fp32: bf16 gradients are not copied whole.
    rows = flat[:whole].view(-1, _ROW).split(_ROWS_AT_ONCE)
    norms = torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in rows] or [flat[:0].float()]).double()
    return norms.square().sum() + torch.linalg.vector_norm(flat[whole:].float()).double().square()


def clip(optimizer: MegatronOptimizer, norm: float) -> None:
    """Scale all gradients, whose global norm is `norm`, so that it is at most the optimizer's limit."""
    for part in inner_parts(optimizer):
        if isinstance(part.optimizer, CompactAdamW):
            part.optimizer.gradient_scale = min(1.0, part.config.clip_grad / (norm + 1.0e-6))
        else:
            clip_gradients(part.get_parameters(), part.config.clip_grad, norm)


def clip_gradients(params: Iterable[torch.Tensor], max_norm: float, norm: float) -> None:
    """Scale the gradients of `params`, whose global norm is `norm`, so that it is at most `max_norm`; in place.

    As megatron-core's clip_grad_by_total_norm_fp32, which copies every gradient where Apex is missing.
    """
    scale = max_norm / (norm + 1.0e-6)
    grads = [param.grad for param in params if param.grad is not None]
    if scale < 1.0 and grads:
        foreach_mul_(grads, scale)

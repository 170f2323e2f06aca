"""One optimizer step: forward and backward over the micro-batches, reduction, clipping, update."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_step.config.run import RunConfig
from megatron_step.engine.microbatch_seed import set_microbatch_seed
from megatron_step.engine.parallel import Parallel
from megatron_step.optim.optimizer import clip, gradient_norm, set_learning_rate
from megatron_step.plan.old_layers import Role
from megatron_step.training.state import TrainState

Microbatch = dict[str, Tensor] | None
"""`tokens` and `labels`, each [b, s]; None on a pipeline rank that has neither the embedding nor the loss."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is infinite or not a number. The run stops before the update of the weights."""


_STOPS = "the run stops before the update. Lower optimizer.learning_rate, and start again from the last checkpoint"


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, the same on every rank."""

    loss: float
    """Mean loss of the global batch, in nats per token, before the update."""
    grad_norm: float
    """Global norm of the gradient, before clipping."""
    stop: bool
    """Whether some rank was asked to stop."""


def train_step(
    state: TrainState,
    microbatches: Sequence[Microbatch],
    learning_rate: float,
    config: RunConfig,
    parallel: Parallel,
    stop_requested: bool,
    warm: Mapping[Role, float] = MappingProxyType({}),
) -> StepResult:
    """Train on one global batch and advance `state` by one step.

    `warm` has the share of `learning_rate` that weights of a role have while they warm up.

    Raises NonFiniteError if the loss or the gradient norm is not finite; the weights are then unchanged.
    """
    assert state.optimizer is not None  # only a released state has none
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    seeds = microbatch_seeds(config.training.seed, state.step, len(microbatches), parallel)
    losses = forward_backward(state.chunks, microbatches, config, forward_only=False, seeds=seeds)
    loss, stops = reduce_over_world([_loss_share(losses, parallel), float(stop_requested)], parallel)
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss of step {state.step + 1} is {loss}: {_STOPS}")
    set_learning_rate(state.optimizer, learning_rate, config.optimizer, warm)
    grad_norm = _update(state, state.optimizer, parallel)
    state.step += 1
    return StepResult(loss=loss, grad_norm=grad_norm, stop=stops > 0)


def _update(state: TrainState, optimizer: MegatronOptimizer, parallel: Parallel) -> float:
    """Clip the gradient and update the weights; return the norm before clipping."""
    optimizer.prepare_grads()
    grad_norm = gradient_norm(optimizer, parallel.device)
    if not math.isfinite(grad_norm):
        raise NonFiniteError(f"the gradient norm of step {state.step + 1} is {grad_norm}: {_STOPS}")
    clip(optimizer, grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm


def evaluate_batch(
    chunks: list[MegatronModule], microbatches: Sequence[Microbatch], config: RunConfig, parallel: Parallel
) -> float:
    """Return the mean loss of a global batch, in nats per token, without gradients; the same on every rank."""
    losses = forward_backward(chunks, microbatches, config, forward_only=True)
    (loss,) = reduce_over_world([_loss_share(losses, parallel)], parallel)
    return loss


def microbatch_seeds(seed: int, step: int, num_microbatches: int, parallel: Parallel) -> list[int]:
    """Return a seed for each of this rank's micro-batches. It depends on the samples, not on layout or resume."""
    places = range(parallel.dp_rank, num_microbatches * parallel.dp_size, parallel.dp_size)
    return [((seed * 1_000_003 + step) * 1_000_003 + place) % (1 << 62) for place in places]


def forward_backward(
    chunks: list[MegatronModule],
    microbatches: Sequence[Microbatch],
    config: RunConfig,
    forward_only: bool,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """Run the schedule of the pipeline layout; return the mean loss of each micro-batch on the last pipeline rank.

    `seeds` has a seed for each micro-batch, for the dropout of adapters.
    """
    megatron_config = chunks[0].config
    megatron_config.finalize_model_grads_func = finalize_model_grads
    megatron_config.grad_scale_func = None
    seeded = list(zip(microbatches, seeds or [0] * len(microbatches)))
    iterators: list[Iterator[tuple[Microbatch, int]]] = [iter(seeded) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )


def _forward_step(microbatches: Iterator[tuple[Microbatch, int]], chunk: MegatronModule) -> tuple[Tensor, Any]:
    microbatch, seed = next(microbatches)
    batch = microbatch or {}
    set_microbatch_seed(seed)
    output = chunk(input_ids=batch.get("tokens"), position_ids=None, attention_mask=None, labels=batch.get("labels"))
    return output, _mean_loss


def _mean_loss(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce losses [b, s] of a micro-batch to the loss that is differentiated and the loss that is reported."""
    loss = losses.mean()
    return loss, loss.detach().clone()  # a copy: the schedule divides the loss by the number of micro-batches in place


def reduce_over_world(values: list[float | Tensor], parallel: Parallel) -> list[float]:
    """Return the sum of each value over all ranks, the same on every rank."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=parallel.device) for value in values])
    torch.distributed.all_reduce(total)
    return total.tolist()


def _loss_share(losses: list[Tensor], parallel: Parallel) -> Tensor | float:
    """Return this rank's share of the global batch's mean loss. The shares of all ranks add up to the mean."""
    if not losses or parallel.tp_rank > 0:
        return 0.0
    return torch.stack(losses).double().mean() / parallel.dp_size

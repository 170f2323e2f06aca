"""Stops a run in which a trainable weight gets no gradient: the loss would look healthy, and the weight never move."""

import torch
from torch import Tensor

from megatron_step.checkpoint.sharding import sharded_weights
from megatron_step.engine.parallel import Parallel
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.state import TrainState


class NoGradientError(RuntimeError):
    """A trainable weight got no gradient in the first step."""


def gradient_check_hook(parallel: Parallel) -> Hook:
    """A hook that looks at the first step's gradients.

    It raises NoGradientError, on every rank, with the names of the trainable weights whose gradient is zero throughout.
    """
    checked = False

    def hook(context: StepContext) -> None:
        nonlocal checked
        if checked:
            return
        checked = True
        names = weights_without_gradient(context.state, parallel)
        if names:
            raise NoGradientError(
                f"{len(names)} trainable weights got no gradient in step {context.state.step}: {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}; the run stops, as they would never be trained"
            )

    return hook


def weights_without_gradient(state: TrainState, parallel: Parallel) -> list[str]:
    """Names of the trainable weights whose gradient is zero on every rank that has a part; alike on every rank."""
    gradients: dict[str, Tensor] = {
        shard.key: shard.data.main_grad
        for shard in sharded_weights(state.chunks, parallel).values()
        if shard.data.requires_grad
    }
    zero = {name for name, gradient in gradients.items() if not gradient.any()}
    suspects = set().union(*_gather(zero, parallel))
    # A part may well be zero, such as rows of the embedding that are padding: some other part must not be.
    reached = set().union(*_gather(suspects & gradients.keys() - zero, parallel))
    return sorted(suspects - reached)


def _gather(names: set[str], parallel: Parallel) -> list[set[str]]:
    ranks: list[set[str]] = [set() for _ in range(parallel.world_size)]
    torch.distributed.all_gather_object(ranks, names)
    return ranks

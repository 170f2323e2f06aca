"""Stop a run in which a trainable weight gets no gradient: the loss would look healthy, but the weight never change."""

from weakref import ref

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_step.config.counts import counted
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import sharded_weights
from megatron_step.training.stage import Hook, StepContext
from megatron_step.training.state import TrainState

CHECKED_STEPS = 3
"""Number of steps of a stage, or of a turn of old layers, whose gradients are checked. In the first step, some
gradients are zero by design: that of a fresh adapter's A, since B is zero, and those of weights before an output
projection that starts as zero."""


class NoGradientError(RuntimeError):
    """A trainable weight got no gradient in the first steps of a stage."""


def gradient_check_hook(parallel: Parallel) -> Hook:
    """Return a hook that checks the gradients of the first steps of each stage and turn in this process.

    It raises NoGradientError, on every rank, with the names of trainable weights whose gradient was zero in each step.
    """
    checked: ref[MegatronOptimizer] | None = None  # a new optimizer comes with each stage and each turn
    suspects, looks = set[str](), 0

    def hook(context: StepContext) -> None:
        nonlocal checked, suspects, looks
        optimizer = context.state.optimizer
        assert optimizer is not None
        if checked is None or checked() is not optimizer:
            checked, looks = ref(optimizer), 0
        elif not suspects or looks == CHECKED_STEPS:
            return
        idle = set(weights_without_gradient(context.state, parallel))
        suspects = idle & suspects if looks else idle
        looks += 1
        if suspects and looks == CHECKED_STEPS:
            names = sorted(suspects)
            raise NoGradientError(
                f"{counted(len(names), 'trainable weight')} got no gradient in the {CHECKED_STEPS} steps up to step "
                f"{context.state.step}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. The run stops, "
                "because training would never change them: freeze them, or make the loss depend on them"
            )

    return hook


def weights_without_gradient(state: TrainState, parallel: Parallel) -> list[str]:
    """Return the trainable weights whose gradient is zero on all ranks that hold them; the same on every rank."""
    gradients: dict[str, Tensor] = {
        shard.key: shard.data.main_grad
        for shard in sharded_weights(state.chunks, parallel).values()
        if shard.data.requires_grad
    }
    zero = {name for name, gradient in gradients.items() if not gradient.any()}
    suspects = set().union(*_gather(zero, parallel))
    # One rank's shard may be zero, such as padding rows of the embedding, if another rank's shard is not.
    reached = set().union(*_gather(suspects & gradients.keys() - zero, parallel))
    return sorted(suspects - reached)


def _gather(names: set[str], parallel: Parallel) -> list[set[str]]:
    ranks: list[set[str]] = [set() for _ in range(parallel.world_size)]
    torch.distributed.all_gather_object(ranks, names)
    return ranks

"""A rank's part of a weight's optimizer states: which elements of the weight, and their states."""

from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_step.engine.compat.optimizers import owned_slice
from megatron_step.plan.states import MAIN_WEIGHT


@dataclass(frozen=True)
class Held:
    """A rank's part of a weight's optimizer states, in the optimizer or on the host."""

    elements: slice
    """Elements of the flattened weight, as this tensor-parallel rank has it."""
    states: dict[str, Tensor]
    """Optimizer states of the elements by name, flat and live."""
    is_replicated: bool
    """Whether every data-parallel rank holds the same elements."""


@dataclass(frozen=True)
class Owned(Held):
    """A rank's part of a trained weight in the optimizer."""

    inner: torch.optim.Optimizer
    """The inner optimizer that updates it."""
    updated: Tensor
    """What the inner optimizer updates, and knows the states by: the main weight, or a compact state's weight."""


def held(optimizer: MegatronOptimizer, param: Tensor) -> Held | None:
    """Return what this rank holds of a weight's states, which wait on the host (optim/resting.py) while it rests.

    Returns None if other data-parallel ranks hold all of them, or if the weight has none.
    """
    return owned(optimizer, param) if param.requires_grad else getattr(param, "resting", None)


def owned(optimizer: MegatronOptimizer, param: Tensor) -> Owned | None:
    """Return what this rank holds of a trained weight; None if other data-parallel ranks hold it all."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        if not isinstance(part, DistributedOptimizer):
            updated = getattr(param, "main_param", param)
            return _owned(part, slice(0, param.numel()), updated, is_replicated=True)
        if param in part.model_param_group_index_map:
            group, place = part.model_param_group_index_map[param]
            updated = part.optimizer.param_groups[group]["params"][place]
            return _owned(part, owned_slice(part, param), updated, is_replicated=False)
    return None


def _owned(part: MegatronOptimizer, elements: slice, updated: Tensor, *, is_replicated: bool) -> Owned:
    states = {name: state.view(-1) for name, state in part.optimizer.state[updated].items()}
    if updated.dtype == torch.float32:
        states[MAIN_WEIGHT] = updated.detach().view(-1)
    return Owned(elements, states, is_replicated, part.optimizer, updated)

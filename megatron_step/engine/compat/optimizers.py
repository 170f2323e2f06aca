"""A rank's shard of megatron-core's distributed optimizer, and the Adam class that megatron-core uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def owned_slice(optimizer: DistributedOptimizer, param: Tensor) -> slice:
    """Return the elements of a flattened parameter whose states this data-parallel rank owns."""
    # The public methods return whole state dicts of all parameters only (megatron-core 0.16.1).
    owned = optimizer._get_model_param_range_map(param)["param"]
    return slice(owned.start, owned.end)


def owned_states(optimizer: DistributedOptimizer, param: Tensor) -> dict[str, Tensor]:
    """Return the states of `owned_slice`, flat and not copied: `param` (the main weight), `exp_avg`, `exp_avg_sq`."""
    return optimizer._get_main_param_and_optimizer_states(param)  # no public way (megatron-core 0.16.1)


@contextmanager
def adam_class(adam: type[torch.optim.Optimizer]) -> Iterator[None]:
    """Make megatron-core build its optimizers on `adam` within the block, if TransformerEngine and Apex are missing."""
    # megatron-core chooses its Adam class at import; no argument changes that (megatron-core 0.16.1).
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        yield
        return
    with (
        patch.multiple(megatron_optimizer, Adam=adam, USING_PYTORCH_OPTIMIZER=False),
        patch.multiple(distrib_optimizer, Adam=adam),
    ):
        yield

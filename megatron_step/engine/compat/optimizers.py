"""What a rank holds of megatron-core's distributed optimizer, and the Adam that megatron-core builds on."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def owned_slice(optimizer: DistributedOptimizer, param: Tensor) -> slice:
    """The elements of a flattened parameter whose states this data-parallel rank owns."""
    # Its public methods give whole state dicts alone, of all parameters at once (megatron-core 0.16.1).
    owned = optimizer._get_model_param_range_map(param)["param"]
    return slice(owned.start, owned.end)


def owned_states(optimizer: DistributedOptimizer, param: Tensor) -> dict[str, Tensor]:
    """The states of that slice, live and flat: `param` (the main weight), `exp_avg` and `exp_avg_sq`."""
    return optimizer._get_main_param_and_optimizer_states(param)  # as above (megatron-core 0.16.1)


@contextmanager
def adam_class(adam: type[torch.optim.Optimizer]) -> Iterator[None]:
    """Within the block megatron-core builds its optimizers on `adam`, if TransformerEngine and Apex are missing."""
    # It chooses its Adam when it is imported, and takes no other (megatron-core 0.16.1).
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        yield
        return
    with (
        patch.multiple(megatron_optimizer, Adam=adam, USING_PYTORCH_OPTIMIZER=False),
        patch.multiple(distrib_optimizer, Adam=adam),
    ):
        yield

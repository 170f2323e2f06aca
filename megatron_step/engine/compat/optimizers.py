"""A rank's shard of megatron-core's distributed optimizer, and the Adam class that megatron-core uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor


def owned_slice(optimizer: DistributedOptimizer, param: Tensor) -> slice:
    """Return the elements of a flattened parameter whose states this data-parallel rank owns."""
    # The public methods return whole state dicts of all parameters only (megatron-core 0.16.1).
    owned = optimizer._get_model_param_range_map(param)["param"]
    return slice(owned.start, owned.end)


def separate_gradients(config: OptimizerConfig) -> OptimizerConfig:
    """Return the config with gradients in `decoupled_grad`, whose type may differ from the weight's, in `step`.

    The optimizer then updates the weights themselves: megatron-core makes no fp32 main weights.
    """
    # The public key `use_precision_aware_optimizer` insists on TransformerEngine's Adam (megatron-core 0.16.1).
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    return config


def separate_gradient(param: Tensor) -> Tensor:
    """Return the gradient that megatron-core leaves for the inner optimizer, fp32 or bf16."""
    gradient: Tensor = param.decoupled_grad  # type: ignore[attr-defined]  # torch's `grad` has the weight's type
    return gradient


class SeparateGradients(FP32Optimizer):
    """megatron-core's optimizer without main weights, for `separate_gradients` without the distributed optimizer."""

    def prepare_grads(self) -> bool:
        """Hand the gradient buffers to the inner optimizer; no infinity is looked for."""
        for param in self.get_parameters():
            param.decoupled_grad = param.main_grad
        return False


@contextmanager
def compact_class(compact: type[torch.optim.Optimizer]) -> Iterator[None]:
    """Make megatron-core build its optimizers on `compact` within the block, for a config of `separate_gradients`."""
    ours: dict[str, Any] = {"Adam": compact, "FP32Optimizer": SeparateGradients, "USING_PYTORCH_OPTIMIZER": False}
    with patch.multiple(megatron_optimizer, **ours), patch.multiple(distrib_optimizer, Adam=compact):
        yield


@contextmanager
def adam_class(adam: type[torch.optim.Optimizer], always: bool = False) -> Iterator[None]:
    """Make megatron-core build its optimizers on `adam` within the block, if TransformerEngine and Apex are missing, or
    `always`."""
    # megatron-core chooses its Adam class at import; no argument changes that (megatron-core 0.16.1).
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER and not always:
        yield
        return
    with (
        patch.multiple(megatron_optimizer, Adam=adam, USING_PYTORCH_OPTIMIZER=False),
        patch.multiple(distrib_optimizer, Adam=adam),
    ):
        yield

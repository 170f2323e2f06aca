"""RMSNorm with sequence parallelism, which megatron-core's norm lacks without TransformerEngine."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_step import ops
from megatron_step.engine.device import current_device


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        # Any, because torch's class lacks the attribute `sequence_parallel`.
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=current_device()))
        # Each tensor-parallel rank has a shard of the sequence, so megatron-core sums the gradients of marked weights.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., h] -> [..., h]."""
        return ops.rms_norm(x, self.weight, self.epsilon)

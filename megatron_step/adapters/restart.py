"""Restart adapters: merge what they have learnt into the base, and start again (ReLoRA, Lialin et al., 2023)."""

from collections.abc import Sequence

import torch

from megatron_step.adapters.attach import adapted_linears, initialize_adapters
from megatron_step.adapters.merge import merge_adapter
from megatron_step.config.model import ModelConfig
from megatron_step.engine.parallel import Parallel


def restart_adapters(chunks: Sequence[torch.nn.Module], model: ModelConfig, parallel: Parallel, seed: int) -> None:
    """Merge every adapter of the chunks into its base weight, in fp32, and draw a fresh one, in place.

    The model's function stays the same but for the rounding of the base weights. Every rank must call it.
    """
    for chunk in chunks:
        for linear in adapted_linears(chunk):
            merge_adapter(linear)
        initialize_adapters(chunk, model, parallel, seed)

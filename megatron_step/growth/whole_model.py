"""The model of a checkpoint on one process, for evaluation."""

import torch

from megatron_step.checkpoint.load import FoundCheckpoint
from megatron_step.checkpoint.manifest import saved_config
from megatron_step.engine.parallel import Parallel
from megatron_step.growth.weights import load_merged, saved_stage
from megatron_step.model.build import build_model


def whole_model(found: FoundCheckpoint, precision: str, parallel: Parallel) -> torch.nn.Module:
    """Load the checkpoint's model with merged adapters on one process, in evaluation mode.

    Raises ValueError if the checkpoint lacks a tensor that the model needs, or has it in another shape.
    """
    model, layout = saved_config(found.manifest).model, (saved_stage(found.manifest).num_layers,)
    (chunk,) = build_model(model, found.manifest.vocab_size, parallel, precision, seed=1, layout=layout)
    load_merged([chunk], found, parallel)
    return chunk.eval()

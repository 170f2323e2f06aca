"""Steps of the optimizer alone, with gradients that are the same in every layout."""

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from small_run import VOCAB_SIZE, manifest_facts

from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.optim.optimizer import clip, set_learning_rate
from megatron_step.optim.slices import pieces
from megatron_step.plan.states import training_recipe
from megatron_step.training.state import initial_state

LEARNING_RATE = 1e-2
NORM = 1.5
"""What the gradients are clipped from."""


def made_up_gradient(key: str, shape: Sequence[int], step: int) -> torch.Tensor:
    """The gradient of a whole weight in a step, which depends on its key, the step and the place alone."""
    generator = torch.Generator().manual_seed(crc32(f"{key} {step}".encode()))
    scale = torch.rand(shape[-1], generator=generator) ** 4
    return torch.randn(tuple(shape), generator=generator) * scale


def step_with_made_up_gradients(config: RunConfig, folder: Path) -> None:
    """Take three steps from the initial weights, and save."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        assert state.optimizer is not None
        set_learning_rate(state.optimizer, LEARNING_RATE, config.optimizer, {})
        for step in range(3):
            for shard in sharded_weights(state.chunks, parallel).values():
                for piece in pieces(shard):
                    whole = made_up_gradient(piece.key, piece.global_shape, step)
                    first = (piece.data.data_ptr() - shard.data.data_ptr()) // piece.data.element_size()
                    own = shard.data.main_grad.view(-1)[first : first + piece.data.numel()]
                    own.copy_(whole[piece.global_slice()].flatten())
            state.optimizer.prepare_grads()
            clip(state.optimizer, NORM)
            state.optimizer.step_with_ready_grads()
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        saver.save(state.chunks, state.optimizer, training_recipe(config), 3, manifest_facts(config))

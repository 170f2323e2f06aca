"""A fresh state has initial weights, zero steps, and an optimizer over every weight."""

import torch
from small_run import VOCAB_SIZE, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.training.state import initial_state


def test_a_fresh_state(alone: Parallel) -> None:
    state = initial_state(small_config(), VOCAB_SIZE, alone)
    assert state.step == 0
    (chunk,) = state.chunks
    assert all(param.requires_grad for param in chunk.parameters())
    optimized = sum(param.numel() for group in state.optimizer.param_groups for param in group["params"])
    assert optimized == sum(param.numel() for param in chunk.parameters())


def test_bf16_weights_have_fp32_gradients(alone: Parallel) -> None:
    state = initial_state(small_config(training={"precision": "bf16"}), VOCAB_SIZE, alone)
    assert {param.dtype for param in state.chunks[0].parameters()} == {torch.bfloat16}
    assert {buffer.grad_data.dtype for buffer in state.chunks[0].buffers} == {torch.float32}

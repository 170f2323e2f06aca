"""The gated MLP is down(silu(gate(x)) * up(x))."""

import torch
import torch.nn.functional as F
from small_run import VOCAB_SIZE, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.layers.mlp import MLP
from megatron_step.model.build import build_model


def test_output_is_that_of_the_formula(alone: Parallel) -> None:
    (chunk,) = build_model(small_config().model, VOCAB_SIZE, alone, "fp32", seed=1)
    mlp = chunk.decoder.layers[1].mlp
    assert isinstance(mlp, MLP)
    x = torch.randn(5, 2, 64)
    gate, up = mlp.linear_fc1.weight.chunk(2)  # the gate's rows come first
    assert gate.shape == (96, 64)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), mlp.linear_fc2.weight)
    output, bias = mlp(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert bias is None

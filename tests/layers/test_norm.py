"""RMSNorm normalises, and marks its weight where ranks see parts of the sequence."""

import pytest
import torch
from small_run import small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.layers.norm import RMSNorm
from megatron_step.model.transformer_config import transformer_config


@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel_size": 2, "sequence_parallel": True}])
def test_the_weight_is_marked_for_sequence_parallelism(alone: Parallel, parallel: dict) -> None:
    config = small_config(parallel=parallel)
    norm = RMSNorm(transformer_config(config.model, (4,), config.parallel, "bf16", False), 64, eps=1e-5)
    assert norm.weight.sequence_parallel is bool(parallel)
    assert norm.weight.dtype == torch.bfloat16
    assert torch.equal(norm.weight, torch.ones(64, dtype=torch.bfloat16))


def test_output_is_torchs(alone: Parallel) -> None:
    config = small_config()
    norm = RMSNorm(transformer_config(config.model, (4,), config.parallel, "fp32", False), 64, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 3, 64) * 0.05
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (64,), norm.weight, eps=1e-3))

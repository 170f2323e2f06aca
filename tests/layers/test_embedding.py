"""An embedding with fp32 output and gradient on bf16 rows, split over ranks, is the whole one."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from small_run import small_config
from torch import Tensor
from worlds import Worlds

from megatron_step.engine.gradient_types import keep_gradient_type
from megatron_step.engine.parallel import parallel_layout
from megatron_step.layers.embedding import widen_embedding
from megatron_step.model.transformer_config import transformer_config

ROWS, WIDTH = 12, 8
TOKENS = torch.tensor([[0, 11, 5, 5], [6, 0, 3, 11]])  # [b, s]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_have_the_rows_and_gradients_of_the_whole(worlds: Worlds, sequence_parallel: bool) -> None:
    weight, grad = (tensor.requires_grad_() for tensor in _whole())
    expected = weight.bfloat16().detach().float().requires_grad_()
    y = expected[TOKENS]
    y.backward(grad.detach())
    layout = {"tensor_parallel_size": 2, "sequence_parallel": sequence_parallel}
    for rank, (output, gradient) in enumerate(worlds(2).run(look_up, parallel=layout)):
        whole = y.detach().transpose(0, 1)[2 * rank : 2 * rank + 2] if sequence_parallel else y.detach()
        assert output.dtype == gradient.dtype == torch.float32
        assert torch.equal(output, whole)
        torch.testing.assert_close(gradient, expected.grad[6 * rank : 6 * rank + 6])


def _whole() -> tuple[Tensor, Tensor]:
    """Weight [v, h] and the output's gradient [b, s, h]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(2, 4, WIDTH, generator=generator)


# What the ranks run.


def look_up(parallel: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """This rank's output and the gradient of its rows."""
    config = small_config(parallel=parallel)
    with parallel_layout(config.parallel, seed=1) as place:
        embedding = VocabParallelEmbedding(
            ROWS,
            WIDTH,
            init_method=lambda weight: None,
            reduce_scatter_embeddings=config.parallel.sequence_parallel,
            config=transformer_config(config.model, (4,), config.parallel, "bf16_weights", False),
            tp_group=place.groups.tp,
        )
        widen_embedding(embedding, torch.float32)
        weight, grad = _whole()
        embedding.weight.data.copy_(weight[6 * place.tp_rank : 6 * place.tp_rank + 6])
        keep_gradient_type(embedding.weight, torch.float32)
        y = embedding(TOKENS)
        if config.parallel.sequence_parallel:
            grad = grad.transpose(0, 1)[2 * place.tp_rank : 2 * place.tp_rank + 2]  # [s / t, b, h]
        y.backward(grad)
        return y.detach(), embedding.weight.grad

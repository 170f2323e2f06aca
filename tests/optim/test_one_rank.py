"""One rank without collectives trains like megatron-core's data parallelism, and clips gradients like megatron-core."""

import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.engine.parallel import parallel_layout
from megatron_step.optim import optimizer
from megatron_step.optim.optimizer import clip_gradients
from megatron_step.training.state import initial_state
from megatron_step.training.step import train_step


@pytest.mark.parametrize("max_norm", [0.5, 3.0, float("inf")])
def test_clipping_is_megatron_cores(max_norm):
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2))]
    norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
    ours = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    theirs = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for params in (ours, theirs):
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
    without_gradient = torch.nn.Parameter(torch.zeros(2))
    clip_gradients([*ours, without_gradient], max_norm, norm)
    clip_grad_by_total_norm_fp32([*theirs, without_gradient], max_norm, norm)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs))
    clipped = torch.cat([param.grad.flatten() for param in ours]).norm().item()
    assert clipped == pytest.approx(min(norm, max_norm), rel=1e-5)
    assert without_gradient.grad is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_one_rank_needs_no_collective(monkeypatch, precision, distributed_optimizer):
    parallel_config = {"distributed_optimizer": distributed_optimizer, "overlap_grad_reduce": True}
    config = small_config(parallel=parallel_config, training={"precision": precision})
    trained = []
    for with_collectives in (False, True):
        if with_collectives:
            monkeypatch.setattr(optimizer, "_SingleReplica", optimizer.DistributedDataParallel)
        with parallel_layout(config.parallel, seed=1) as parallel:
            state = initial_state(config, VOCAB_SIZE, parallel)
            results = [
                train_step(state, made_up_batch(config, i, parallel), 1e-2, config, parallel, False) for i in (1, 2)
            ]
            trained.append(
                (results, {name: w.clone() for name, w in state.chunks[0].state_dict().items() if w is not None})
            )
    (results, weights), (same_results, same_weights) = trained
    assert results == same_results
    assert all(
        torch.equal(weight, same_weights[name]) for name, weight in weights.items() if isinstance(weight, torch.Tensor)
    )

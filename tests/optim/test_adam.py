"""FusedAdam is torch's AdamW, with one count of steps for each group."""

import pytest
import torch

from megatron_step.optim.adam import FusedAdam

_SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_updates_are_those_of_torchs_adamw() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    optimizers = [FusedAdam(ours, **_SETTINGS), torch.optim.AdamW(theirs, **_SETTINGS)]
    for _ in range(5):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
    assert optimizers[0].param_groups[0]["step"] == 5


def test_the_count_goes_on_where_a_rank_has_no_gradient() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], **_SETTINGS)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert torch.equal(param.detach(), torch.ones(2))
    assert not optimizer.state, "state holds the moments of updated parameters and nothing else"


def test_decay_in_the_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode must be true"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], **_SETTINGS, adam_w_mode=False)

"""Ranks own slices that make up each parameter, with live states; megatron-core builds on the Adam that it is given."""

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from small_run import VOCAB_SIZE, small_config
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.compat.optimizers import adam_class, owned_slice
from megatron_step.engine.parallel import parallel_layout
from megatron_step.optim.owned import owned
from megatron_step.training.state import initial_state


def test_the_ranks_slices_make_up_each_parameter_and_their_states_are_live(worlds: Worlds) -> None:
    ranks = worlds(2).run(slices_of_this_rank, config=small_config(training={"precision": "bf16"}))
    names = ranks[0].keys() | ranks[1].keys()
    for name in names:
        slices = sorted(rank[name] for rank in ranks if name in rank)
        assert slices[0][0] == 0
        assert [end for _, end, _ in slices[:-1]] == [start for start, _, _ in slices[1:]]
        assert slices[-1][1] == slices[0][2], f"{name} is not owned to its end"


def slices_of_this_rank(config: RunConfig) -> dict[str, tuple[int, int, int]]:
    """Return by name the start and end of each parameter's slice, and the parameter's length."""
    slices = {}
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        (part,) = state.optimizer.chained_optimizers
        assert isinstance(part, DistributedOptimizer)
        held = {tensor.data_ptr() for moments in part.optimizer.state.values() for tensor in moments.values()}
        for name, param in state.chunks[0].named_parameters():
            if param not in part.model_param_group_index_map:
                continue
            own = owned(state.optimizer, param)
            elements, states = own.elements, own.states
            assert elements == owned_slice(part, param)
            assert set(states) == {"param", "exp_avg", "exp_avg_sq"}
            assert all(tensor.shape == (elements.stop - elements.start,) for tensor in states.values())
            assert {states["exp_avg"].data_ptr(), states["exp_avg_sq"].data_ptr()} <= held
            torch.testing.assert_close(states["param"].bfloat16(), param.detach().flatten()[elements])
            slices[name] = (elements.start, elements.stop, param.numel())
    return slices


def test_megatron_core_has_the_given_adam_within_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    before = megatron_optimizer.Adam
    with adam_class(torch.optim.Adagrad):
        assert megatron_optimizer.Adam is distrib_optimizer.Adam is torch.optim.Adagrad
        assert not megatron_optimizer.USING_PYTORCH_OPTIMIZER
    assert megatron_optimizer.Adam is before
    assert megatron_optimizer.USING_PYTORCH_OPTIMIZER


def test_a_fused_adam_that_is_installed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    before = megatron_optimizer.Adam
    with adam_class(torch.optim.Adagrad):
        assert megatron_optimizer.Adam is before

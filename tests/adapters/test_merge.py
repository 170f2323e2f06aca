"""A merged model computes what the adapted one computed, to rounding."""

from typing import Any

import pytest
import torch
from serial_oracle import fill_adapters, state_of
from small_run import made_up_batch, small_config, whole_tensors
from worlds import Worlds

from megatron_step.adapters.attach import adapted_linears
from megatron_step.adapters.merge import merge_adapter
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.training.step import evaluate_batch

STAGES: dict[str, Any] = {"count": 2, "layers": [3, 1]}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-3)])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_a_merged_model_has_the_loss_of_the_adapted_one(
    worlds: Worlds, precision: str, tolerance: float, mlp: str
) -> None:
    config = small_config(stages=STAGES, training={"precision": precision}, model={"num_query_groups": 2, "mlp": mlp})
    ((plain, adapted, merged, _),) = worlds(1).run(losses, config=config)
    assert merged == pytest.approx(adapted, rel=tolerance)
    assert abs(plain - adapted) > 5 * tolerance, "the adapters matter"


def test_bf16_weights_are_rounded_once(alone: Parallel) -> None:
    state = state_of(small_config(stages=STAGES, training={"precision": "bf16"}), 1, alone)
    fill_adapters(state)
    for linear in adapted_linears(state.chunks[0]):
        a, b = linear.adapter.linear_in.weight.double(), linear.adapter.linear_out.weight.double()
        exact = linear.weight.double() + linear.adapter.scaling * b @ a
        merge_adapter(linear)
        # Half of the last of eight bits; fp32's own error, of the terms that the sum is of, is far smaller.
        half = torch.ldexp(torch.tensor(1.0), exact.abs().log2().floor() - 8)
        assert ((linear.weight - exact).abs() <= 1.001 * half + 1e-7).all()


@pytest.mark.parametrize(
    "layout", [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "sequence_parallel": True}]
)
def test_split_over_ranks_it_is_the_same(worlds: Worlds, layout: dict[str, Any]) -> None:
    """B is a constant, so that it is the same in every layout."""
    (expected,) = worlds(1).run(losses, config=small_config(stages=STAGES), constant=True)
    found = worlds(2).run(losses, config=small_config(stages=STAGES, parallel=layout), constant=True)[0]
    assert found[:3] == pytest.approx(expected[:3], rel=1e-6)
    for key, weight in expected[3].items():
        torch.testing.assert_close(found[3][key], weight, rtol=1e-6, atol=1e-7)


# What the ranks run.


def losses(config: RunConfig, constant: bool = False) -> tuple[float, float, float, dict[str, torch.Tensor] | None]:
    """The loss without adapters' effect, with it, and once they are merged and taken away; and the merged weights."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, 1, parallel)
        batch = made_up_batch(config, 1, parallel)
        for chunk in state.chunks:
            chunk.eval()
        plain = evaluate_batch(state.chunks, batch, config, parallel)
        if constant:
            fill_constant(state.chunks[0])
        else:
            fill_adapters(state)
            for linear in adapted_linears(state.chunks[0]):
                linear.adapter.linear_out.weight.data.mul_(20)
        adapted = evaluate_batch(state.chunks, batch, config, parallel)
        for linear in list(adapted_linears(state.chunks[0])):
            merge_adapter(linear)
            linear.adapter.linear_out.weight.data.zero_()
        merged = evaluate_batch(state.chunks, batch, config, parallel)
        return plain, adapted, merged, whole_tensors(state, parallel, lambda weight: weight.detach())


def fill_constant(chunk: torch.nn.Module) -> None:
    """A B that is not zero and is the same in every layout: a constant for each linear."""
    for number, linear in enumerate(adapted_linears(chunk)):
        linear.adapter.linear_out.weight.data.fill_(0.02 * (1 + number % 3))

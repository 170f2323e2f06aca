"""Initial weights follow from seed and name alone: they are the same in every layout."""

import math
from typing import Any

import pytest
import torch
from small_run import TIED, small_config, whole_tensors
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.state import build_state, initial_state

_VOCAB_SIZE = 1500  # more rows than are drawn at a time


@pytest.mark.parametrize("model", [None, TIED], ids=["plain", "tied"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
    ],
    ids=["TP", "PP x VPP"],
)
def test_weights_do_not_depend_on_the_layout(worlds: Worlds, model: dict[str, Any] | None, parallel: dict) -> None:
    (serial,) = worlds(1).run(_weights, config=small_config(model=model))
    split = worlds(2).run(_weights, config=small_config(model=model, parallel=parallel))[0]
    assert serial.keys() == split.keys()
    for key, tensor in serial.items():
        assert torch.equal(tensor, split[key]), key


def test_distribution_of_each_kind_of_weight(worlds: Worlds) -> None:
    (weights,) = worlds(1).run(_weights, config=small_config(model=TIED))
    for key, tensor in weights.items():
        if key.endswith("bias"):
            assert not tensor.any(), key
        elif "norm" in key:
            assert torch.equal(tensor, torch.ones_like(tensor)), key
        else:
            residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.02 / math.sqrt(2 * 4) if residual else 0.02
            assert float(tensor.std()) == pytest.approx(std, rel=0.1), key
            assert abs(float(tensor.mean())) < 0.1 * std, key


def test_seeds_and_layers_give_other_weights(worlds: Worlds) -> None:
    (first,) = worlds(1).run(_weights, config=small_config())
    (second,) = worlds(1).run(_weights, config=small_config(training={"seed": 2}))
    name = "decoder.layers.{}.mlp.linear_fc2.weight"
    assert not torch.equal(first[name.format(0)], second[name.format(0)])
    assert not torch.equal(first[name.format(0)], first[name.format(1)])


def test_adapters_begin_as_no_change(worlds: Worlds) -> None:
    (weights,) = worlds(1).run(_second_stage_weights)
    adapters = {key: tensor for key, tensor in weights.items() if ".adapter." in key}
    assert len(adapters) == 3 * 4 * 2
    for key, tensor in adapters.items():
        if key.endswith("linear_out.weight"):
            assert not tensor.any(), key
        else:
            assert float(tensor.std()) == pytest.approx(1 / math.sqrt(3 * tensor.shape[1]), rel=0.15), key
    inputs = [tensor for key, tensor in adapters.items() if key.endswith("linear_qkv.adapter.linear_in.weight")]
    assert not torch.equal(inputs[0], inputs[1])


def _second_stage_weights() -> dict[str, torch.Tensor] | None:
    config = small_config(stages={"count": 2, "layers": [3, 1]})
    plan = make_plan(resolve(config, _VOCAB_SIZE))
    with parallel_layout(config.parallel, seed=1) as parallel:
        state = build_state(config, plan, plan.stages[1], plan.stages[1].first_step, _VOCAB_SIZE, parallel)
        return whole_tensors(state, parallel, lambda weight: weight.detach())


def _weights(config: RunConfig) -> dict[str, torch.Tensor] | None:
    with parallel_layout(config.parallel, seed=1) as parallel:
        return whole_tensors(initial_state(config, _VOCAB_SIZE, parallel), parallel, lambda weight: weight.detach())

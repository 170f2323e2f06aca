"""Adapters are put on the requested linears, change nothing at first, and are the same in every layout."""

from typing import Any

import pytest
import torch
from serial_oracle import state_of
from small_run import VOCAB_SIZE, small_config, whole_tensors
from worlds import WorldError, Worlds

from megatron_step.adapters.attach import adapted_linears, attach_adapters, numbered_layers
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import AdapterConfig, Target
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import build_model

STAGES: dict[str, Any] = {"count": 2, "layers": [3, 1]}
TARGETS: list[Target] = ["qkv", "proj", "fc1", "fc2"]


def _model(config: RunConfig, parallel: Parallel) -> torch.nn.Module:
    (chunk,) = build_model(config.model, VOCAB_SIZE, parallel, config.training.precision, seed=1)
    return chunk


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fresh_adapter_changes_nothing(alone: Parallel, precision: str) -> None:
    config = small_config(training={"precision": precision})
    chunk = _model(config, alone)
    tokens = torch.arange(32).expand(2, 32)
    before = chunk(input_ids=tokens, position_ids=None, attention_mask=None)
    attach_adapters(chunk, config.model, AdapterConfig(rank=8), lambda layer: TARGETS, alone, seed=1)
    chunk.eval()
    assert torch.equal(chunk(input_ids=tokens, position_ids=None, attention_mask=None), before)


def test_names_of_base_weights_stay(alone: Parallel) -> None:
    config = small_config()
    chunk = _model(config, alone)
    before = dict(chunk.named_parameters())
    attach_adapters(chunk, config.model, AdapterConfig(rank=8), lambda layer: TARGETS, alone, seed=1)
    after = dict(chunk.named_parameters())
    assert all(after[name] is param for name, param in before.items())
    added = after.keys() - before.keys()
    assert len(added) == 4 * 4 * 2
    assert all(name.endswith((".adapter.linear_in.weight", ".adapter.linear_out.weight")) for name in added)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_factors_are_marked_as_split_as_their_base(alone: Parallel, mlp: str) -> None:
    """megatron-core counts norms, and takes weights apart, by these marks."""
    config = small_config(model={"mlp": mlp})
    chunk = _model(config, alone)
    attach_adapters(chunk, config.model, AdapterConfig(rank=8), lambda layer: TARGETS, alone, seed=1)
    for linear in adapted_linears(chunk):
        factors = (linear.adapter.linear_in.weight, linear.adapter.linear_out.weight)
        assert all(factor.tensor_model_parallel for factor in factors)
        assert {factor.partition_dim for factor in factors} == {linear.weight.partition_dim}
        assert [factor.partition_stride for factor in factors] == [1, linear.weight.partition_stride]


def test_only_the_targets_of_the_chosen_layers_get_one(alone: Parallel) -> None:
    config = small_config()
    chunk = _model(config, alone)
    wanted: dict[int, list[Target]] = {1: ["proj", "fc1"], 3: ["proj", "fc1"]}
    attach_adapters(chunk, config.model, AdapterConfig(rank=8), lambda layer: wanted.get(layer, []), alone, seed=1)
    for number, layer in numbered_layers(chunk):
        has = [
            linear.adapter is not None
            for linear in (
                layer.self_attention.linear_qkv,
                layer.self_attention.linear_proj,
                layer.mlp.linear_fc1,
                layer.mlp.linear_fc2,
            )
        ]
        assert has == ([False, True, True, False] if number in (1, 3) else [False] * 4)
    assert len(list(adapted_linears(chunk))) == 4


def test_each_has_a_place_of_its_own_for_its_dropout(alone: Parallel) -> None:
    config = small_config()
    chunk = _model(config, alone)
    attach_adapters(chunk, config.model, AdapterConfig(rank=8), lambda layer: TARGETS, alone, seed=1)
    sites = [linear.adapter.site for linear in adapted_linears(chunk)]
    assert len(set(sites)) == len(sites) == 16


def test_first_values_are_the_same_in_every_layout(worlds: Worlds) -> None:
    (expected,) = worlds(1).run(factors, config=small_config(stages=STAGES))
    for layout in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        found = worlds(2).run(factors, config=small_config(stages=STAGES, parallel=layout))[0]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    ins = [key for key in expected if "linear_in" in key]
    assert len(ins) == len(expected) / 2 == 12
    for key in ins:
        inputs = expected[key].shape[1]
        assert expected[key].std() == pytest.approx((3 * inputs) ** -0.5, rel=0.2)
        assert not expected[key.replace("linear_in", "linear_out")].any()


def test_a_rank_that_cannot_be_split_is_refused(worlds: Worlds) -> None:
    with pytest.raises(WorldError, match="adapter rank 3 is not divisible by 2 tensor-parallel ranks"):
        worlds(2).run(attach_rank_3)


# What the ranks run.


def factors(config: RunConfig) -> dict[str, torch.Tensor] | None:
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, 1, parallel)
        whole = whole_tensors(state, parallel, lambda weight: weight.detach())
        return whole and {key: tensor for key, tensor in whole.items() if ".adapter." in key}


def attach_rank_3() -> None:
    config = small_config(parallel={"tensor_parallel_size": 2})
    with parallel_layout(config.parallel, 1) as parallel:
        chunk = _model(config, parallel)
        attach_adapters(chunk, config.model, AdapterConfig(rank=3), lambda layer: TARGETS, parallel, seed=1)

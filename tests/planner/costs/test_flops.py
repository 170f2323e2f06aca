"""The count of operations agrees with torch's own counter."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from small_run import PLAIN, TIED, VOCAB_SIZE, small_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_step.config.run import RampUpConfig, RunConfig, batch_size_at, consumed_samples
from megatron_step.ops.adapter_linear import adapter_linear_reference
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.flops import run_flops, stage_flops_per_token
from megatron_step.planner.plan import make_plan


def test_operations_are_those_that_torch_counts() -> None:
    seq_length, vocab_size = 16, 96
    model = {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": seq_length,
    }
    peer = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3,
            hidden_size=32,
            intermediate_size=80,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab_size,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter:
        peer(torch.zeros(1, seq_length, dtype=torch.long))
    # torch counts all s^2 scores, the formula the s (s + 1) / 2 of the causal half.
    all_scores = 3 * 2 * 2 * 32 * seq_length * seq_length
    causal_scores = 3 * 2 * 2 * 32 * seq_length * (seq_length + 1) // 2
    expected = counter.get_total_flops() - all_scores + causal_scores
    config = small_config(model=model)
    (stage,) = make_plan(resolve(config, vocab_size)).stages
    # The backward pass has two products for each of the forward pass.
    assert stage_flops_per_token(resolve(config, vocab_size), stage) * seq_length == 3 * expected


def _stage_flops(index: int, **sections: Any) -> int:
    config = small_config(**sections)
    return stage_flops_per_token(resolve(config, VOCAB_SIZE), make_plan(resolve(config, VOCAB_SIZE)).stages[index])


def _training_flops(config: RunConfig, num_layers: int) -> int:
    """All trained: three products of two operations for each weight, and for the causal half of the scores."""
    model = config.model
    attention = model.num_attention_heads * model.attention_head_size
    key_value = 2 * model.query_groups * model.attention_head_size
    matrices = 3 if model.mlp == "swiglu" else 2
    layer = model.hidden_size * (2 * attention + key_value + matrices * model.ffn_hidden_size)
    scores = attention * (model.seq_length + 1)
    return 6 * (num_layers * (layer + scores) + model.hidden_size * VOCAB_SIZE)


@pytest.mark.parametrize("model", [PLAIN, TIED, {"mlp": "gelu", "head_size": 8}], ids=["plain", "tied", "gelu"])
def test_an_ordinary_stage_takes_a_whole_step(model: dict[str, Any]) -> None:
    config = small_config(model=model)
    assert _stage_flops(0, model=model) == _training_flops(config, 4)
    staged = {"count": 2, "layers": [3, 1]}
    assert _stage_flops(0, model=model, stages=staged) == _training_flops(config, 3)
    unfrozen = {"layers": False}
    assert _stage_flops(1, model=model, stages=staged, freeze=unfrozen) == _training_flops(config, 4)


def test_a_frozen_linear_takes_two_thirds() -> None:
    staged: dict[str, Any] = {"stages": {"count": 2, "layers": [3, 1]}, "adapter": {"rank": 0}}
    linears = 64 * (64 + 2 * 32) + 64 * 64 + 64 * 2 * 96 + 96 * 64
    saved = _training_flops(small_config(), 4) - _stage_flops(1, **staged)
    assert saved == 2 * 3 * linears
    frozen_output = _stage_flops(1, **staged, freeze={"output_layer": True})
    assert _stage_flops(1, **staged) - frozen_output == 2 * 64 * VOCAB_SIZE
    assert _stage_flops(1, **staged, freeze={"embedding": True}) == _stage_flops(1, **staged), "it has no products"
    tied = {**staged, "model": TIED}
    assert _stage_flops(1, **tied) - _stage_flops(1, **tied, freeze={"embedding": True}) == 2 * 64 * VOCAB_SIZE
    assert _stage_flops(1, **tied, freeze={"output_layer": True}) == _stage_flops(1, **tied), "it has no weight"


def test_adapters_add_what_torch_counts() -> None:
    tokens, inputs, outputs, rank = 10, 96, 64, 4  # as of the down projection
    x = torch.randn(tokens, inputs, requires_grad=True)
    a, b = torch.randn(rank, inputs, requires_grad=True), torch.randn(outputs, rank, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        adapter_linear_reference(x, torch.randn(outputs, inputs), a, b, 2.0).sum().backward()
    staged: dict[str, Any] = {"stages": {"count": 2, "layers": [3, 1]}}
    without = _stage_flops(1, **staged, adapter={"rank": 0})
    added = _stage_flops(1, **staged, adapter={"rank": rank, "targets": ["fc2"]}) - without
    assert counter.get_total_flops() == tokens * (added // 3 + 4 * inputs * outputs)
    assert added % 3 == 0, "of three old layers"


def test_the_operations_of_a_run_add_up_over_its_stages() -> None:
    ramp = RampUpConfig(start=2, increment=2, samples=12)
    config = small_config(
        stages={"count": 2, "layers": [3, 1], "steps": 4}, training={"micro_batch_size": 1, "ramp_up": ramp}
    )
    plan = make_plan(resolve(config, VOCAB_SIZE))
    assert [(stage.first_step, stage.last_step) for stage in plan.stages] == [(0, 3), (3, 7)]
    batches = [batch_size_at(config.training, consumed_samples(config.training, step)) for step in range(7)]
    expected = [0, *accumulate(32 * size * per_token for size, per_token in zip(batches, [10] * 3 + [100] * 4))]
    assert [run_flops(config, plan, [10, 100], steps) for steps in range(8)] == expected

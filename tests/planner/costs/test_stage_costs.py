"""The costs in the planner's search equal those of planner/costs/memory.py for the same layout, except for padding."""

from typing import Any

import numpy as np
import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.flops import stage_flops_per_token
from megatron_step.planner.costs.held import held_chunks
from megatron_step.planner.costs.machines import Machine
from megatron_step.planner.costs.memory import growth_bytes, stage_memory
from megatron_step.planner.costs.stage_costs import range_bytes, range_seconds, stage_costs
from megatron_step.planner.plan import make_plan

LAYOUTS: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"pipeline_parallel_size": 2}, 1),
    ({"pipeline_parallel_size": 2, "recompute": "full"}, 2),
    ({"pipeline_parallel_size": 3, "tensor_parallel_size": 2, "sequence_parallel": True, "recompute": "selective"}, 2),
    ({"pipeline_parallel_size": 2, "distributed_optimizer": False}, 2),
]


@pytest.mark.parametrize(("parallel", "dp_size"), LAYOUTS)
@pytest.mark.parametrize(
    "different",
    [
        {"model": {"tie_embeddings": True, "num_query_groups": 2}},
        {"training": {"precision": "bf16"}, "model": {"qk_norm": True, "qkv_bias": True, "num_query_groups": 2}},
        {"freeze": {"norms": True, "output_layer": True}, "adapter": {"targets": ["qkv", "fc2"]}, "model": {}},
    ],
)
def test_bytes_of_a_range_are_those_of_the_rank(
    parallel: dict[str, Any], dp_size: int, different: dict[str, Any]
) -> None:
    different = {**different, "model": {"num_layers": 9, **different["model"]}}
    stages = {"count": 3, "layers": [5, 2, 2], "layouts": "even"}
    config = small_config(stages=stages, parallel=parallel, **different)
    for stage in make_plan(resolve(config, VOCAB_SIZE, dp_size)).stages:
        costs = stage_costs(resolve(config, VOCAB_SIZE, dp_size), first=stage.index == 0)
        needed = range_bytes(costs, [layer.born == stage.index for layer in stage.layers])
        ends = np.cumsum(stage.layout)
        for pp_rank, memory in enumerate(stage_memory(resolve(config, VOCAB_SIZE, dp_size), stage)):
            counted = needed[pp_rank, ends[pp_rank] - stage.layout[pp_rank], ends[pp_rank]]
            growing = growth_bytes(held_chunks(resolve(config, VOCAB_SIZE), stage)[pp_rank][0].parameters, stage)
            peak = max(memory.peak_bytes, memory.model_state_bytes + growing)
            assert counted == pytest.approx(peak, rel=4e-3)  # data-parallel ranks own different shares of the padding
            assert counted <= peak * (1 + 1e-12) or growing > memory.activation_bytes


def test_empty_ranges_are_infinite() -> None:
    costs = stage_costs(resolve(small_config(), VOCAB_SIZE), first=True)
    needed = range_bytes(costs, [True] * 4)
    assert np.array_equal(np.isinf(needed[0]), np.tri(5, dtype=bool))
    assert np.array_equal(np.isinf(range_seconds(costs, [True] * 4, [Machine()])[0]), np.tri(5, dtype=bool))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_seconds_are_operations_over_speed(recompute: str) -> None:
    config = small_config(stages={"count": 2, "layers": [3, 1]}, parallel={"recompute": recompute})
    first, second = make_plan(resolve(config, VOCAB_SIZE)).stages
    for stage in (first, second):
        costs = stage_costs(resolve(config, VOCAB_SIZE), first=stage.index == 0)
        is_new = [layer.born == stage.index for layer in stage.layers]
        seconds = range_seconds(costs, is_new, [Machine(flops=1e6)])[0, 0, -1]
        tokens = config.training.global_batch_size * config.model.seq_length
        useful = stage_flops_per_token(resolve(config, VOCAB_SIZE), stage) * tokens / 1e6
        if recompute == "none":
            assert seconds == pytest.approx(useful)
        else:
            assert 1.1 * useful < seconds < 1.4 * useful


def test_a_pipeline_waits_for_its_ends() -> None:
    """Four micro-batches take the time of five with two ranks, of four and a half with two chunks on each."""
    for virtual, slots in ((1, 5.0), (2, 4.5)):
        parallel = {"pipeline_parallel_size": 2, "virtual_pipeline_size": virtual}
        assert stage_costs(resolve(small_config(parallel=parallel), VOCAB_SIZE), first=True).slots == slots


def test_exchanges_take_time() -> None:
    config = small_config(parallel={"tensor_parallel_size": 2})
    costs = stage_costs(resolve(config, VOCAB_SIZE, 2), first=True)
    fast, slow = (
        range_seconds(costs, [True], [Machine(1, 1e9, bandwidth, bandwidth)])[0, 0, 1] for bandwidth in (1e12, 1e6)
    )
    tokens = config.training.micro_batch_size * config.model.seq_length
    # Two microbatches, four sums over two ranks of [tokens, hidden] in fp32, each of which sends its tensor once.
    tensor = 2 * 4 * tokens * config.model.hidden_size * 4
    # The layer's gradients and weights, half of each, and embedding and output layer's.
    data = costs.new.reduced_bytes + costs.ranks[0].reduced_bytes
    assert slow - fast == pytest.approx((tensor + data) / 1e6, rel=1e-3)

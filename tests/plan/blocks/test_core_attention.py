"""Planned bytes of an attention that keeps every score equal the measured bytes of megatron-core's stock attention."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from small_run import VOCAB_SIZE, made_up_batch, small_config
from torch import Tensor
from worlds import Worlds

from megatron_step.engine.parallel import parallel_layout
from megatron_step.layers import spec
from megatron_step.plan.blocks.core_attention import Core
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_peak
from megatron_step.training.state import build_state
from megatron_step.training.step import train_step

SIZES: dict[str, Any] = {"num_layers": 3, "num_attention_heads": 8, "num_query_groups": 8, "seq_length": 128}
GROUPED = {**SIZES, "num_query_groups": 2}
NORMED = {**GROUPED, "qk_norm": True}
STAGED: dict[str, Any] = {"stages": {"count": 2, "layers": [2, 1]}, "planner": {"attention": "unfused"}}
BF16: dict[str, Any] = {"precision": "bf16"}
TENSOR: dict[str, Any] = {"tensor_parallel_size": 2, "sequence_parallel": True}
CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {"model": SIZES, **STAGED},
        {"model": SIZES, "training": BF16, **STAGED},
        {"model": GROUPED, "training": BF16, **STAGED, "parallel": {"recompute": "selective"}},
        {"model": GROUPED, **STAGED, "parallel": {"recompute": "selective"}},
        {"model": NORMED, "training": BF16, **STAGED},
        {"model": GROUPED, "training": BF16, **STAGED, "parallel": {"recompute": "full"}},
    ],
    2: [
        {"model": GROUPED, "training": BF16, **STAGED, "parallel": TENSOR},
        {"model": SIZES, **STAGED, "parallel": {"pipeline_parallel_size": 2}},
    ],
}


class StockAttention(DotProductAttention):
    """megatron-core's own, which makes the causal mask itself."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().forward(query, key, value, None)


def measured_and_planned(cases: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Return for each stage of each config a description, and measured and planned bytes of this rank."""
    compared = []
    for case in cases:
        config = small_config(**case)
        plan = make_plan(resolve(config, VOCAB_SIZE))
        with parallel_layout(config.parallel, seed=1) as parallel, patch.object(spec, "SDPAttention", StockAttention):
            for stage in plan.stages:
                state = build_state(config, plan, stage, stage.first_step, VOCAB_SIZE, parallel)
                batch = made_up_batch(config, 0, parallel)

                def step() -> Any:
                    return train_step(state, batch, 1e-4, config, parallel, False)  # noqa: B023

                step()  # what stays is allocated by the first
                parallel_state.get_global_memory_buffer().buffer.clear()  # but the scores' buffer is counted
                _, measured = measure_peak(step)
                planned = stage_memory(resolve(config, VOCAB_SIZE, parallel.dp_size), stage)[
                    parallel.pp_rank
                ].activation_bytes
                compared.append((f"{case}, stage {stage.index}", measured, planned))
                state.release()
    return compared


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_with_the_stock_attention_needs_what_was_planned(worlds: Worlds, size: int) -> None:
    for rank in worlds(size).run(measured_and_planned, cases=CASES[size]):
        for case, measured, planned in rank:
            assert measured <= planned <= 1.1 * measured, case


BATCH = Microbatch(tokens=2 * 128, element_bytes=2, tensor=1, sequence_parallel=False)


def core(groups: int = 8, normed: bool = False) -> Core:
    return Core(heads=8, groups=groups, head_size=8, seq_length=128, normed=normed)


def test_kept_bytes_by_hand() -> None:
    """Two samples of 128 tokens, 8 heads."""
    scores = 2 * 8 * 128 * 128
    queries, keys = 2 * 256 * 64, 2 * 256 * 16
    assert core().linear(BATCH).kept == 4 * 2 * 128 * 8
    every = 6 * scores + 128 * 128
    assert core().unfused(BATCH, recomputed=False).kept == every
    # Keys and values of all heads for those of groups, of which the norms keep the keys anyway.
    assert core(2).unfused(BATCH, recomputed=False).kept == every + 2 * queries - 2 * keys
    assert core(2, normed=True).unfused(BATCH, recomputed=False).kept == every + 2 * queries - keys
    assert core(2).unfused(BATCH, recomputed=True).kept == every + 2 * queries


def test_the_scores_share_one_buffer_in_the_process() -> None:
    assert core().shared_buffer(replace(BATCH, element_bytes=4)) == 4 * 2 * 8 * 128 * 128


def planned(seq_length: int, recompute: str = "none") -> int:
    config = small_config(
        model={**SIZES, "seq_length": seq_length}, parallel={"recompute": recompute}, planner={"attention": "unfused"}
    )
    return stage_memory(resolve(config, VOCAB_SIZE), make_plan(resolve(config, VOCAB_SIZE)).stages[0])[
        0
    ].activation_bytes


def test_scores_grow_with_the_square_of_the_sequence() -> None:
    assert 3.5 < planned(2048) / planned(1024) < 4


def test_selective_recompute_keeps_the_scores_of_one_layer_at_a_time() -> None:
    scores = 4 * 2 * 8 * 1024 * 1024  # softmax
    assert planned(1024) - planned(1024, "selective") == pytest.approx(2 * scores, rel=0.05)

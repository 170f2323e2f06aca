"""The planned activation bytes of a step are the measured ones, or slightly more."""

from typing import Any

import pytest
from small_run import VOCAB_SIZE, made_up_batch, small_config
from worlds import Worlds

from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_step
from megatron_step.training.state import build_state
from megatron_step.training.step import train_step

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 128,
}
TIED = {**SIZES, "tie_embeddings": True, "qk_norm": True, "qkv_bias": True}
GELU = {**SIZES, "num_query_groups": 4, "mlp": "gelu"}
DEEP = {**SIZES, "num_layers": 5}
BF16: dict[str, Any] = {"precision": "bf16"}
FP32: dict[str, Any] = {"precision": "fp32"}
STAGED: dict[str, Any] = {"stages": {"count": 2, "layers": [3, 1]}}
FROZEN = {"norms": True, "embedding": True, "output_layer": True, "final_norm": True}
INTERLEAVED = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}


def measured_and_planned(cases: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Return for each stage of each config a description, and measured and planned bytes of this rank."""
    compared = []
    for case in cases:
        config = small_config(**case)
        plan = make_plan(resolve(config, VOCAB_SIZE))
        with parallel_layout(config.parallel, seed=1) as parallel:
            for stage in plan.stages:
                state = build_state(config, plan, stage, stage.first_step, VOCAB_SIZE, parallel)
                batch = made_up_batch(config, 0, parallel)

                def step() -> Any:
                    return train_step(state, batch, 1e-4, config, parallel, False)  # noqa: B023

                step()  # what stays is allocated by the first
                _, memory = measure_step(state, step)
                planned = stage_memory(resolve(config, VOCAB_SIZE, parallel.dp_size), stage)[
                    parallel.pp_rank
                ].activation_bytes
                compared.append((f"{case}, stage {stage.index}", memory.activation_bytes, planned))
                state.release()
    return compared


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (
            1,
            [
                {"model": SIZES, "training": BF16, **STAGED},
                {"model": SIZES, "training": FP32, **STAGED, "adapter": {"rank": 32, "targets": ["qkv", "fc2"]}},
                {"model": TIED, "training": BF16, **STAGED, "parallel": {"recompute": "selective"}},
                {"model": TIED, "training": FP32, **STAGED, "parallel": {"recompute": "full"}},
                {"model": GELU, "training": BF16, **STAGED, "adapter": {"rank": 0}, "freeze": FROZEN},
                {"model": GELU, "training": FP32, **STAGED, "freeze": FROZEN},
            ],
        ),
        (
            2,
            [
                {"model": SIZES, "training": BF16, **STAGED},
                {"model": SIZES, "training": BF16, **STAGED, "parallel": {"tensor_parallel_size": 2}},
                {
                    "model": DEEP,
                    "training": {**FP32, "micro_batch_size": 4},
                    "stages": {"count": 2, "layers": [4, 1]},
                    "parallel": {"tensor_parallel_size": 2, "sequence_parallel": True},
                },
                {"model": TIED, "training": FP32, **STAGED, "parallel": {"pipeline_parallel_size": 2}},
                {"model": DEEP, "training": BF16, "stages": {"count": 2, "layers": [4, 1]}, "parallel": INTERLEAVED},
                {"model": SIZES, "training": BF16, "parallel": {**INTERLEAVED, "recompute": "full"}},
            ],
        ),
    ],
)
def test_a_step_needs_what_was_planned(worlds: Worlds, size: int, cases: list[dict[str, Any]]) -> None:
    for rank in worlds(size).run(measured_and_planned, cases=cases):
        for case, measured, planned in rank:
            assert measured <= planned <= 1.1 * measured, case


def planned(**sections: Any) -> int:
    config = small_config(**sections)
    stage = make_plan(resolve(config, VOCAB_SIZE)).stages[-1]
    return stage_memory(resolve(config, VOCAB_SIZE), stage)[0].activation_bytes


def test_recomputing_more_keeps_less() -> None:
    none, selective, full = (
        planned(model=SIZES, parallel={"recompute": recompute}) for recompute in ("none", "selective", "full")
    )
    assert full < selective < none


def test_sequence_parallelism_keeps_less_than_tensor_parallelism_alone() -> None:
    plain, split = (
        planned(model=SIZES, parallel={"tensor_parallel_size": 2, "sequence_parallel": sequence_parallel})
        for sequence_parallel in (False, True)
    )
    assert split < plain


def test_a_frozen_layer_without_adapters_keeps_less() -> None:
    bare, adapted = (planned(model=SIZES, **STAGED, adapter={"rank": rank}) for rank in (0, 8))
    assert bare < adapted


def test_micro_batches_add_nothing_on_one_pipeline_rank() -> None:
    few, many = (planned(model=SIZES, training={"global_batch_size": size}) for size in (2, 64))
    assert few == many

"""The weights that the planner lists are those of the real model, in the same order, treated in the same way."""

from typing import Any

import pytest
from small_run import PLAIN, TIED, VOCAB_SIZE, small_config
from worlds import Worlds

from megatron_step.engine.parallel import parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.plan.layout import rank_chunks
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import Parameter
from megatron_step.plan.trainable import Treatment
from megatron_step.planner.costs.held import held_chunks, held_ends
from megatron_step.planner.plan import make_plan
from megatron_step.training.state import build_state

Listed = tuple[str, tuple[int, ...], bool]
"""Key, shape on this rank, and whether it is trained."""
STAGED: dict[str, Any] = {"stages": {"count": 2, "layers": [3, 1]}}
INTERLEAVED = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}


def built_and_listed(cases: list[dict[str, Any]]) -> list[tuple[list[list[Listed]], list[list[Listed]]]]:
    """Return this rank's real and planned weights by chunk, for the last stage of each config."""
    compared = []
    for case in cases:
        config = small_config(**case)
        plan = make_plan(resolve(config, VOCAB_SIZE))
        stage = plan.stages[-1]
        with parallel_layout(config.parallel, seed=1) as parallel:
            state = build_state(config, plan, stage, stage.first_step, VOCAB_SIZE, parallel)
            keys = {id(shard.data): shard.key for shard in sharded_weights(state.chunks, parallel).values()}
            built = [
                [(keys[id(param)], tuple(param.shape), param.requires_grad) for param in chunk.parameters()]
                for chunk in state.chunks
            ]
            listed = [
                [(parameter.key, parameter.shape, parameter.treatment.trained) for parameter in held.parameters]
                for held in held_chunks(resolve(config, VOCAB_SIZE), stage)[parallel.pp_rank]
            ]
        compared.append((built, listed))
    return compared


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (
            1,
            [
                {"model": PLAIN, **STAGED},
                {"model": {**TIED, "mlp": "gelu"}, **STAGED, "adapter": {"targets": ["qkv", "fc2"]}},
                {"model": TIED, **STAGED, "freeze": {"norms": True, "embedding": True, "final_norm": True}},
                {"model": PLAIN, **STAGED, "freeze": {"layers": False, "output_layer": True}},
            ],
        ),
        (
            2,
            [
                {"model": PLAIN, **STAGED, "parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}},
                {"model": TIED, **STAGED, "parallel": {"tensor_parallel_size": 2}},
                {"model": TIED, **STAGED, "parallel": {"pipeline_parallel_size": 2}},
                {
                    "model": {**PLAIN, "num_layers": 5},
                    "stages": {"count": 2, "layers": [4, 1]},
                    "parallel": INTERLEAVED,
                },
            ],
        ),
    ],
)
def test_the_list_is_the_real_model(worlds: Worlds, size: int, cases: list[dict[str, Any]]) -> None:
    for rank in worlds(size).run(built_and_listed, cases=cases):
        for built, listed in rank:
            assert listed == built


def test_a_model_in_one_piece_has_one_embedding_and_head() -> None:
    for model, expected in ((PLAIN, 3), (TIED, 2)):
        config = small_config(model=model)
        stage = make_plan(resolve(config, VOCAB_SIZE)).stages[0]
        (whole,) = rank_chunks(config.parallel, 0)
        outer = held_ends(resolve(config, VOCAB_SIZE), stage, whole).parameters
        assert len(outer) == expected
        layers_too = held_chunks(resolve(config, VOCAB_SIZE), stage)[0][0].parameters
        assert [parameter for parameter in layers_too if "layers" not in parameter.key] == list(outer)


def test_elements_are_the_product_of_the_lengths() -> None:
    assert Parameter("key", (3, 5), Treatment(True, "base", 0)).numel == 15

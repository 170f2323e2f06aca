"""Every rank reads in as many turns as the fullest one, each layer in one of them."""

from typing import Any

import pytest
from serial_oracle import state_of
from small_run import small_config
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.growth.turns import turns
from megatron_step.model.build import sharded_weights


@pytest.mark.parametrize(
    ("stages", "layout", "expected"),
    [
        ({}, {"pipeline_parallel_size": 2}, [[None, 0, 1], [None, 2, 3]]),
        ({"layouts": [[3, 1]]}, {"pipeline_parallel_size": 2}, [[None, 0, 1, 2], [None, 3, None, None]]),
        ({}, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}, [[None, 0, 2], [None, 1, 3]]),
    ],
)
def test_layers_by_their_numbers(
    worlds: Worlds, stages: dict[str, Any], layout: dict[str, Any], expected: list
) -> None:
    ranks = worlds(2).run(layers_and_sizes, config=small_config(stages=stages, parallel=layout))
    assert [[layer for layer, _ in rank] for rank in ranks] == expected
    for rank in ranks:
        assert all(size == (6 if layer is not None else size) for layer, size in rank)
        assert all(size == 0 for layer, size in rank[1:] if layer is None)


def layers_and_sizes(config: RunConfig) -> list[tuple[int | None, int]]:
    with parallel_layout(config.parallel, 1) as parallel:
        state = state_of(config, 0, parallel)
        parts = turns(sharded_weights(state.chunks, parallel), state.stage, parallel)
        return [(layer, len(shards)) for layer, shards in parts]

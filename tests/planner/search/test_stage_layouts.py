"""Layouts of a stage: bounds are below what is found, and each answer is a layout of the stage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.run import RunConfig
from megatron_step.plan.operators import Interpolate, register
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.machines import Machine
from megatron_step.planner.costs.stage_costs import run_costs
from megatron_step.planner.search.stage_layouts import StageLayouts

UNEQUAL = [Machine(2**30, 1e12), Machine(2**29, 0.5e12)]


def layouts_of(virtual: int = 1, **stages: Any) -> StageLayouts:
    config = small_config(
        model={"num_layers": 9},
        stages={"count": 2, **stages},
        parallel={"pipeline_parallel_size": 2, "virtual_pipeline_size": virtual},
    )
    return search_layouts(config)


def search_layouts(config: RunConfig, machines: Sequence[Machine] = UNEQUAL) -> StageLayouts:
    resolved = resolve(config, VOCAB_SIZE)
    return StageLayouts(resolved, run_costs(resolved), machines, seconds=5)


@pytest.mark.parametrize("virtual", [1, 2])
def test_bounds_are_below_what_is_found(virtual: int) -> None:
    layouts = layouts_of(virtual)
    shares, seconds = layouts.share_bounds(), layouts.seconds_bounds()
    for before in (0, *range(2 * virtual, 9)):
        for after in range(max(before + 1, 2 * virtual), 10):
            split = layouts.least_share(before, after)
            assert sum(split.layout) == after
            assert shares[before, after] <= split.cost * (1 + 1e-12)
            fastest = layouts.fastest(before, after, limit=1.0)
            assert seconds[before, after] <= fastest.cost * (1 + 1e-12)


def test_stages_that_cannot_be_have_no_bound() -> None:
    bounds = layouts_of().share_bounds()
    assert np.isinf(bounds[0, 1])  # fewer layers than ranks
    assert np.isfinite(bounds[1, 5])  # a model of fewer layers than ranks may be one that was trained before
    assert np.isinf(bounds[5, 4])
    assert np.isfinite(bounds[5, 5])  # a stage may add no layers


def test_bounds_rise_only_where_the_operator_only_inserts() -> None:
    class Spread(Interpolate):
        """An operator like interpolate that does not promise to only insert layers."""

        name = "spread"
        only_inserts = False

    register(Spread())
    rise = {}
    for operator in ("interpolate", "spread"):
        config = small_config(
            model={"num_layers": 8},
            growth={"operator": operator},
            parallel={"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
        )
        rise[operator] = search_layouts(config).bounds_rise
    assert rise == {"interpolate": True, "spread": False}


def test_within_the_limit_or_not_at_all() -> None:
    layouts = layouts_of()
    least = layouts.least_share(4, 9)
    assert layouts.fastest(4, 9, least.cost).layout
    assert layouts.fastest(4, 9, least.cost * 0.99).layout == ()


def test_even_layouts_are_not_changed() -> None:
    layouts = layouts_of(layouts="even")
    assert layouts.least_share(0, 9).layout == layouts.fastest(0, 9, 1.0).layout == (5, 4)


def test_the_small_rank_gets_fewer_layers() -> None:
    layout = layouts_of().least_share(0, 9).layout
    assert layout[0] > layout[1]


def test_old_layers_take_less() -> None:
    assert layouts_of().old_layers_save
    config = small_config(stages={"count": 2}, freeze={"layers": False})
    assert not search_layouts(config, [Machine()]).old_layers_save

"""A stage with frozen layers and adapters computes in every parallel layout what it computes in one process."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from long_suite import cases
from serial_oracle import LAYOUTS, SP, differences, train, write_checkpoint
from small_run import small_config
from worlds import WorldError, Worlds

from megatron_step.config.run import RunConfig
from megatron_step.training.state import TrainState

# Four old layers with adapters, a new one between them.
STAGES: dict[str, Any] = {"count": 2, "layers": [4, 1]}

# What differs from the default: a gated MLP and grouped queries; a plain MLP and everything else that a layer can have.
CASES: dict[str, dict[str, Any]] = {
    "gated": {"model": {"num_layers": 5, "num_query_groups": 2}, "adapter": {"dropout": 0.2}},
    "plain": {
        "model": {"num_layers": 5, "mlp": "gelu", "tie_embeddings": True, "qk_norm": True, "qkv_bias": True},
        "freeze": {"norms": True, "embedding": True},
        "adapter": {"rank": 8, "targets": ["qkv", "fc1", "fc2"]},
    },
}

# What `make test` runs: each layout and each recompute, in one of the two cases.
KEPT: dict[str, list[str]] = {
    "gated": ["one, full", "TP2 SP", "PP2 VPP2, full", "DP2 distributed", "TP2 PP2 DP2"],
    "plain": ["TP2, full", "TP2 SP, selective", "PP2 VPP2", "DP2 overlap", "PP4", "TP2 PP2 DP2 SP, full"],
}


def _config(case: str, layout: dict[str, Any]) -> RunConfig:
    return small_config(stages=STAGES, parallel=layout, **CASES[case])


@pytest.fixture(scope="module")
def serial_of(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """One process's checkpoint of a grown stage, its adapters not fresh, and what it computes from there."""

    @cache
    def run_serial(case: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(case)
        config = _config(case, {"distributed_optimizer": False})
        worlds(1).run(write_checkpoint, config=config, folder=folder, stage_index=1)
        (result,) = worlds(1).run(train, config=config, folder=folder, stage_index=1)
        return {"folder": folder, "result": result}

    return run_serial


@pytest.mark.parametrize(
    ("case", "name"), cases(product(CASES, LAYOUTS), [(case, name) for case, names in KEPT.items() for name in names])
)
def test_layout_equals_one_process(
    serial_of: Callable[[str], dict[str, Any]], worlds: Worlds, case: str, name: str
) -> None:
    serial, (world_size, layout) = serial_of(case), LAYOUTS[name]
    config = _config(case, layout)
    result = worlds(world_size).run(train, config=config, folder=serial["folder"], stage_index=1)[0]
    assert differences(result, serial["result"]) == []


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_sees_every_adapter_and_no_frozen_weight(
    serial_of: Callable[[str], dict[str, Any]], case: str
) -> None:
    gradient = serial_of(case)["result"]["gradient"]
    adapters = [key for key in gradient if ".adapter." in key]
    targets = CASES[case]["adapter"].get("targets", ["qkv", "proj", "fc1", "fc2"])
    assert len(adapters) == 4 * len(targets) * 2, "A and B of every target in four layers"
    assert all(gradient[key].any() for key in adapters)
    assert not any(
        key.startswith("decoder.layers.0.") and ".adapter." not in key for key in gradient if "norm" not in key
    )


@pytest.mark.parametrize(("case", "layout"), [("gated", SP), ("plain", {})])
def test_oracle_catches_planted_fault(
    serial_of: Callable[[str], dict[str, Any]], worlds: Worlds, case: str, layout: dict[str, Any]
) -> None:
    """Another scaling of an adapter on one rank only."""
    serial, config = serial_of(case), _config(case, layout)
    try:
        result = worlds(2).run(
            train, config=config, folder=serial["folder"], stage_index=1, fault=another_scaling_on_rank_1
        )[0]
    except WorldError as error:
        assert "ranks disagree about" in str(error)
    else:
        assert any(line.startswith("gradient decoder.layers") for line in differences(result, serial["result"]))


def another_scaling_on_rank_1(state: TrainState) -> None:
    if torch.distributed.get_rank() == 1:
        state.chunks[0].module.decoder.layers[0].self_attention.linear_qkv.adapter.scaling *= 1.01

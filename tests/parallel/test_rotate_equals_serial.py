"""Old layers that are trained in turn compute in every parallel layout what they compute in one process."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from long_suite import cases
from serial_oracle import LAYOUTS, Groups, differences, train, write_checkpoint
from small_run import VOCAB_SIZE, small_config
from worlds import WorldError, Worlds

from megatron_step.config.run import RunConfig
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.state import TrainState

# Five old layers and a new one; ten steps have three turns.
STAGES: dict[str, Any] = {"count": 2, "layers": [5, 1], "steps": 20}
TURNS: dict[str, Any] = {"policy": "rotate", "turn_steps": 3}
BF16: dict[str, Any] = {"precision": "bf16_weights"}
CASES: dict[str, dict[str, Any]] = {
    "gated": {"model": {"num_layers": 6, "num_query_groups": 2}, "old_layers": TURNS},
    "plain, exact": {
        "model": {"num_layers": 6, "mlp": "gelu", "tie_embeddings": True, "qk_norm": True, "qkv_bias": True},
        "freeze": {"norms": True, "embedding": True},
        "old_layers": {**TURNS, "order": "random"},
        "training": BF16,
        "optimizer": {"states": "exact"},
    },
    "compact": {
        "model": {"num_layers": 6, "num_query_groups": 2},
        "old_layers": TURNS,
        "training": BF16,
        "optimizer": {"states": "compact", "gradients": "fp32"},
    },
    "muon": {"model": {"num_layers": 6, "num_query_groups": 2}, "old_layers": TURNS, "optimizer": {"rule": "muon"}},
    "reset": {"model": {"num_layers": 6, "num_query_groups": 2}, "old_layers": {**TURNS, "moments": "reset"}},
}

# What `make test` runs: each layout and each recompute, in one of the cases.
KEPT: dict[str, list[str]] = {
    "gated": ["one, full", "TP2 SP", "PP2 VPP2, full", "DP2 overlap", "PP4"],
    "plain, exact": ["TP2, full", "TP2 SP, selective", "DP2", "TP2 PP2 DP2 SP, full"],
    "compact": ["PP2 VPP2", "DP2 distributed", "TP2 PP2 DP2"],
    "reset": ["DP2 distributed"],
    "muon": ["TP2 PP2", "DP2 distributed"],
}


def _config(case: str, layout: dict[str, Any]) -> RunConfig:
    return small_config(stages=STAGES, parallel=layout, **CASES[case])


def _groups(config: RunConfig) -> Groups:
    return make_plan(resolve(config, VOCAB_SIZE)).stages[1].turn_groups


@pytest.fixture(scope="module")
def serial_of(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """One process's checkpoint of a grown stage, and what it computes from there with a layout's turn groups."""

    @cache
    def run_serial(case: str, groups: Groups) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(case)
        config = _config(case, {"distributed_optimizer": False})
        worlds(1).run(write_checkpoint, config=config, folder=folder, stage_index=1, groups=groups)
        (result,) = worlds(1).run(train, config=config, folder=folder, stage_index=1, groups=groups)
        return {"folder": folder, "result": result}

    return run_serial


@pytest.mark.parametrize(
    ("case", "name"), cases(product(CASES, LAYOUTS), [(case, name) for case, names in KEPT.items() for name in names])
)
def test_layout_equals_one_process(
    serial_of: Callable[..., dict[str, Any]], worlds: Worlds, case: str, name: str
) -> None:
    world_size, layout = LAYOUTS[name]
    config = _config(case, layout)
    serial = serial_of(case, _groups(config))
    result = worlds(world_size).run(train, config=config, folder=serial["folder"], stage_index=1)[0]
    rounds_weights = config.training.precision == "bf16_weights"
    assert differences(result, serial["result"], bf16_weights=rounds_weights) == []


def test_the_oracle_sees_layers_that_rest(serial_of: Callable[..., dict[str, Any]]) -> None:
    serial = serial_of("gated", _groups(_config("gated", {})))
    trained = {key for key in serial["result"]["gradient"] if key.endswith("linear_fc2.weight")}
    assert len(trained) == 4, "three of five old layers, and the new one"


def test_oracle_catches_planted_fault(serial_of: Callable[..., dict[str, Any]], worlds: Worlds) -> None:
    """A rank loses moments that wait on its host."""
    config = _config("gated", {})
    serial = serial_of("gated", _groups(config))
    try:
        result = worlds(2).run(train, config=config, folder=serial["folder"], stage_index=1, fault=lose_on_rank_1)[0]
    except WorldError as error:
        assert "ranks disagree about" in str(error)
    else:
        assert any(line.startswith("weight decoder.layers") for line in differences(result, serial["result"]))


def lose_on_rank_1(state: TrainState) -> None:
    for param in state.chunks[0].parameters():
        if param.rests and torch.distributed.get_rank() == 1:
            param.resting.states["exp_avg"].zero_()

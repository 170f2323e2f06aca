"""Every parallel layout computes the same as one process, from the same checkpoint and data."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from long_suite import cases
from serial_oracle import FULL, PP2, SELECTIVE, SP, TP2, VPP2, differences, train, write_checkpoint
from small_run import (
    PLAIN,
    TIED,
    VOCAB_SIZE,
    made_up_batch,
    small_config,
    whole_tensors,
)
from worlds import WorldError, Worlds

from megatron_step.config.parallel import ParallelConfig
from megatron_step.config.run import RampUpConfig, RunConfig, batch_size_at, check_world
from megatron_step.engine.parallel import parallel_layout
from megatron_step.training.state import TrainState, initial_state
from megatron_step.training.step import train_step

ARCHITECTURES = {"plain": PLAIN, "tied": TIED}
BF16_WEIGHTS = "tied, bf16 weights"
CASES: dict[str, dict[str, Any]] = {
    **{name: {"model": model, "training": {}} for name, model in ARCHITECTURES.items()},
    BF16_WEIGHTS: {"model": TIED, "training": {"precision": "bf16_weights"}},
    **{
        f"tied, {states}": {
            "model": TIED,
            "training": {"precision": "bf16_weights"},
            "optimizer": {"states": states, "gradients": "fp32"},
        }
        for states in ("exact", "compact", "smallest")
    },
    "tied, muon": {"model": TIED, "training": {}, "optimizer": {"rule": "muon"}},
    "plain, muon compact": {
        "model": PLAIN,
        "training": {"precision": "bf16_weights"},
        "optimizer": {"rule": "muon", "states": "compact", "gradients": "fp32"},
    },
}
"""Sections of the config, by name."""

ODD: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 60,
    "head_size": 10,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "ffn_hidden_size": 50,
    "seq_length": 31,
    "vocab_size_multiple": 14,
}

PP3 = {"pipeline_parallel_size": 3}

# World size, and what differs from the default layout.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one, full": (1, FULL),
    "one, selective": (1, SELECTIVE),
    "TP2": (2, TP2),
    "TP2, full": (2, {**TP2, **FULL}),
    "TP2, selective": (2, {**TP2, **SELECTIVE}),
    "TP2 SP": (2, SP),
    "TP2 SP, full": (2, {**SP, **FULL}),
    "TP2 SP, selective": (2, {**SP, **SELECTIVE}),
    "PP2": (2, PP2),
    "PP2, full": (2, {**PP2, **FULL}),
    "PP2 VPP2": (2, VPP2),
    "PP2 VPP2, full": (2, {**VPP2, **FULL}),
    "DP2": (2, {"distributed_optimizer": False}),
    "DP2, full": (2, {"distributed_optimizer": False, **FULL}),
    "DP2 distributed": (2, {}),
    "DP2 distributed, full": (2, FULL),
    "DP2 overlap": (2, {"overlap_grad_reduce": True}),
    "DP2 overlap, full": (2, {"overlap_grad_reduce": True, "distributed_optimizer": False, **FULL}),
    "TP2 PP2": (4, {**TP2, **PP2}),
    "TP2 PP2 SP, full": (4, {**SP, **PP2, **FULL}),
    "PP4": (4, {"pipeline_parallel_size": 4}),
    "PP2 VPP2 DP2 overlap": (4, {**VPP2, "overlap_grad_reduce": True}),
    "TP2 PP2 DP2": (8, {**TP2, **PP2}),
    "TP2 PP2 DP2 SP, full": (8, {**SP, **PP2, **FULL}),
}


# What `make test` runs: each kind of exchange and each recompute.
KEPT: dict[str, list[str]] = {
    "plain": [
        "one, full",
        "one, selective",
        "TP2, full",
        "TP2 SP",
        "TP2 SP, selective",
        "PP2 VPP2, full",
        "DP2",
        "DP2 overlap, full",
        "PP2 VPP2 DP2 overlap",
        "TP2 PP2 DP2 SP, full",
    ],
    "tied": ["TP2 SP", "PP2 VPP2", "DP2 distributed", "PP4", "TP2 PP2 DP2"],
    BF16_WEIGHTS: ["TP2 SP, full", "PP2 VPP2", "DP2 overlap"],
    "tied, exact": ["TP2 PP2 DP2"],
    "tied, compact": ["TP2", "PP2 VPP2", "DP2 distributed", "TP2 PP2 DP2"],
    "tied, smallest": ["TP2 SP", "TP2 PP2 DP2"],
    "tied, muon": ["TP2", "TP2 SP", "PP2", "PP2 VPP2", "DP2 distributed", "TP2 PP2 DP2"],
    "plain, muon compact": ["TP2 SP", "PP2 VPP2", "TP2 PP2 DP2"],
}


@pytest.fixture(scope="module")
def serial_of(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """One process's checkpoint of a case's third step and what it computes from there."""

    @cache
    def run_serial(case: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(case)
        config = small_config(parallel={"distributed_optimizer": False}, **CASES[case])
        worlds(1).run(write_checkpoint, config=config, folder=folder)
        (result,) = worlds(1).run(train, config=config, folder=folder)
        return {"folder": folder, "result": result}

    return run_serial


@pytest.mark.parametrize(
    ("case", "name"), cases(product(CASES, LAYOUTS), [(case, name) for case, names in KEPT.items() for name in names])
)
def test_layout_equals_one_process(
    serial_of: Callable[[str], dict[str, Any]], worlds: Worlds, case: str, name: str
) -> None:
    serial, (world_size, layout), sections = serial_of(case), LAYOUTS[name], CASES[case]
    # Four micro-batches a step, or two where tensor-parallel ranks alone exchange something for each layer of each.
    size = 4 if layout.get("tensor_parallel_size", 1) == world_size else 2
    training = {**sections["training"], "micro_batch_size": size}
    config = small_config(**{**sections, "parallel": layout, "training": training})
    result = worlds(world_size).run(train, config=config, folder=serial["folder"])[0]
    rounds_weights = config.training.precision == "bf16_weights"
    coded = case == "plain, muon compact"
    assert differences(result, serial["result"], bf16_weights=rounds_weights, coded_momentum=coded) == []


def test_odd_sizes_equal_one_process(worlds: Worlds, tmp_path: Path) -> None:
    """Three ranks in a row or side by side; nothing a power of two; a vocabulary that is padded."""
    sections: dict[str, Any] = {"model": ODD, "training": {"global_batch_size": 12}}
    config = small_config(parallel={"distributed_optimizer": False}, **sections)
    worlds(1).run(write_checkpoint, config=config, folder=tmp_path)
    (expected,) = worlds(1).run(train, config=config, folder=tmp_path)
    for world_size, layout in (
        (2, TP2),
        (3, {}),
        (3, {**PP3, "virtual_pipeline_size": 2}),
        (6, {**TP2, **PP3, **FULL}),
        (6, {**PP3, "overlap_grad_reduce": True}),
    ):
        config = small_config(parallel=layout, **sections)
        result = worlds(world_size).run(train, config=config, folder=tmp_path)[0]
        assert differences(result, expected) == [], layout


@pytest.mark.parametrize(
    ("fault", "layout"),
    [("swapped messages", VPP2), ("norm gradients not summed", SP), ("no data-parallel reduction", {})],
)
def test_oracle_catches_planted_fault(
    serial_of: Callable[[str], dict[str, Any]], worlds: Worlds, fault: str, layout: dict[str, Any]
) -> None:
    serial = serial_of("plain")
    config = small_config(parallel=layout, **CASES["plain"])
    try:
        result = worlds(2).run(train, config=config, folder=serial["folder"], fault=FAULTS[fault])[0]
    except WorldError as error:
        assert "ranks disagree about decoder.layers" in str(error)
    else:
        assert any(line.startswith("gradient decoder.layers") for line in differences(result, serial["result"]))


@pytest.mark.parametrize(("world_size", "layout"), [(2, VPP2), (8, {**SP, **PP2, **FULL})])
def test_bf16_agrees_to_its_own_rounding(worlds: Worlds, world_size: int, layout: dict[str, Any]) -> None:
    config = small_config(parallel=layout, training={"precision": "bf16"})
    serial = worlds(1).run(train_from_start, config=replace(config, parallel=ParallelConfig()))[0]
    parallel = worlds(world_size).run(train_from_start, config=config)[0]
    assert parallel["losses"] == pytest.approx(serial["losses"], rel=5e-3)
    assert parallel["grad_norms"] == pytest.approx(serial["grad_norms"], rel=5e-2)
    assert serial["losses"][-1] < serial["losses"][0]


@pytest.mark.parametrize(("world_size", "layout"), [(2, SP), (2, VPP2), (2, {})])
def test_ramped_batches_equal_one_process(worlds: Worlds, world_size: int, layout: dict[str, Any]) -> None:
    ramp_up = {"start": 4, "increment": 4, "samples": 24}
    config = small_config(parallel=layout, training={"micro_batch_size": 2, "global_batch_size": 16})
    serial = replace(config, parallel=ParallelConfig())
    expected = worlds(1).run(train_from_start, config=serial, ramp_up=ramp_up)[0]
    result = worlds(world_size).run(train_from_start, config=config, ramp_up=ramp_up)[0]
    assert expected["batch_sizes"] == [4, 4, 8, 12, 16, 16, 16, 16, 16, 16]
    assert result["batch_sizes"] == expected["batch_sizes"]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5)


def test_first_weights_are_the_same_in_every_layout(worlds: Worlds) -> None:
    for model in ARCHITECTURES.values():
        (expected,) = worlds(1).run(first_weights, config=small_config(model=model))
        for world_size, layout in ((2, SP), (2, VPP2), (4, {**TP2, **PP2})):
            weights = worlds(world_size).run(first_weights, config=small_config(model=model, parallel=layout))[0]
            assert weights.keys() == expected.keys()
            for key, weight in weights.items():
                assert torch.equal(weight, expected[key]), key


# What the ranks run.


def train_from_start(config: RunConfig, ramp_up: dict[str, int] | None = None) -> dict[str, Any]:
    """Ten steps from the initial weights."""
    training = replace(config.training, ramp_up=RampUpConfig(**ramp_up) if ramp_up else None)
    config = replace(config, training=training)
    check_world(config, torch.distributed.get_world_size())
    results, sizes, samples = [], [], 0
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        for step in range(10):
            sizes.append(batch_size_at(training, samples))
            samples += sizes[-1]
            batch = made_up_batch(config, step % 2, parallel, sizes[-1])
            results.append(train_step(state, batch, 3e-3, config, parallel, False))
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "batch_sizes": sizes,
    }


def first_weights(config: RunConfig) -> dict[str, torch.Tensor] | None:
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        return whole_tensors(state, parallel, lambda weight: weight.detach())


def swap_messages(state: TrainState) -> None:
    """Use megatron-core's default for interleaved pipelines: wrong under gloo if both neighbours are one rank."""
    state.chunks[0].config.batch_p2p_comm = True
    state.chunks[0].config.overlap_p2p_comm = False


def forget_norms(state: TrainState) -> None:
    """Omit the mark of a norm's weight, so that its gradient covers only this rank's shard of the sequence."""
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.sequence_parallel = False


def forget_reduction(state: TrainState) -> None:
    """Each data-parallel rank goes on with its own gradient."""
    for chunk in state.chunks:
        chunk.finish_grad_sync = lambda *unused, **unused_too: None


FAULTS: dict[str, Callable[[TrainState], None]] = {
    "swapped messages": swap_messages,
    "norm gradients not summed": forget_norms,
    "no data-parallel reduction": forget_reduction,
}

"""A turn of a rotation is what saving a checkpoint before it and loading it after gives, in every layout and recipe."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from serial_oracle import state_of
from small_run import TIED, VOCAB_SIZE, made_up_batch, manifest_facts, small_config
from torch import Tensor
from worlds import Worlds

from megatron_step.checkpoint.load import find_checkpoint
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.optim.owned import held
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import training_recipe
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.training.entry import first_state
from megatron_step.training.hooks.rotate import rotate
from megatron_step.training.memory import measure_step
from megatron_step.training.state import TrainState
from megatron_step.training.step import evaluate_batch, train_step

TURN = 2
STAGES: dict[str, Any] = {"count": 2, "layers": [4, 1], "steps": [4, 12], "grow_at": 1.0}
BF16 = {"precision": "bf16_weights"}
RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    **{
        states: {"training": BF16, "optimizer": {"states": states}}
        for states in ("full", "exact", "compact", "smallest")
    },
    "correction": {"training": BF16, "optimizer": {"states": "compact", "correction_bits": 8}},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"distributed_optimizer": False}),
    "DP2 distributed": (2, {}),
    "DP2": (2, {"distributed_optimizer": False}),
    "TP2 SP": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "PP2 VPP2": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    "DP3 overlap": (3, {"overlap_grad_reduce": True}),
    "TP2 PP2 DP2": (8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
}


def _config(**sections: Any) -> RunConfig:
    rotation = {"policy": "rotate", "turn_steps": TURN, **sections.pop("old_layers", {})}
    model = {"num_layers": 5, "num_query_groups": 2, **sections.pop("model", {})}
    return small_config(model=model, old_layers=rotation, **{"stages": STAGES, **sections})


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        *((recipe, "DP2 distributed") for recipe in RECIPES),
        *(("compact", layout) for layout in LAYOUTS if layout != "DP2 distributed"),
        ("fp32", "one"),
        ("full", "DP2"),
        ("full", "TP2 PP2 DP2"),
    ],
)
def test_a_turn_is_a_checkpoint_saved_and_loaded(worlds: Worlds, tmp_path: Path, recipe: str, layout: str) -> None:
    size, parallel = LAYOUTS[layout]
    training = {**RECIPES[recipe].get("training", {}), "global_batch_size": 12}
    config = _config(**{**RECIPES[recipe], "parallel": parallel, "training": training}, model=TIED)
    for turned, loaded in worlds(size).run(turn_and_load, config=config, folder=tmp_path):
        assert turned.keys() == loaded.keys()
        assert [key for key in turned if not _same(turned[key], loaded[key])] == []
        assert any(key.endswith("rests") for key in turned)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_no_logit_changes_and_memory_moves_with_the_layers(alone: Parallel) -> None:
    config = _config()
    state = state_of(config, 1, alone)
    batch = made_up_batch(config, 0, alone)
    for _ in range(TURN):
        train_step(state, batch, 1e-3, config, alone, False)
    before = evaluate_batch(state.chunks, batch, config, alone)
    trained = _trained(state)
    rotate(state, config, alone)
    assert evaluate_batch(state.chunks, batch, config, alone) == before
    assert len(_trained(state)) == len(trained) and _trained(state) != trained
    for param in state.chunks[0].parameters():
        assert hasattr(param, "main_grad") is param.requires_grad
        assert param.untyped_storage().nbytes() == param.nbytes or param.requires_grad


def test_each_turn_needs_the_planned_bytes_and_leaves_no_wrapper_behind(alone: Parallel) -> None:
    config = _config(model={"num_layers": 8}, stages={**STAGES, "layers": [7, 1]})
    state, resolved = state_of(config, 1, alone), resolve(config, VOCAB_SIZE)
    batch = made_up_batch(config, 0, alone)
    for turn in range(4):
        train_step(state, batch, 1e-3, config, alone, False)
        _, memory = measure_step(state, lambda: train_step(state, batch, 1e-3, config, alone, False))
        (planned,) = stage_memory(resolved, state.stage, turn)
        assert memory.model_state_bytes == planned.model_state_bytes
        assert memory.activation_bytes == pytest.approx(planned.activation_bytes, rel=0.02)
        rotate(state, config, alone)
        left = [one for one in gc.get_objects() if isinstance(one, DistributedDataParallel) and one not in state.chunks]
        assert left == []


def _trained(state: TrainState) -> set[str]:
    return {name for name, param in state.chunks[0].named_parameters() if param.requires_grad}


@pytest.mark.parametrize("precision", ["fp32", "bf16_weights"])
def test_reset_moments_start_again(alone: Parallel, precision: str) -> None:
    config = _config(old_layers={"moments": "reset"}, training={"precision": precision})
    state = state_of(config, 1, alone)
    batch = made_up_batch(config, 0, alone)
    names = []
    for _ in range(3):
        names.append(_trained(state))
        for _ in range(TURN):
            train_step(state, batch, 1e-3, config, alone, False)
        rotate(state, config, alone)
    weights = dict(state.chunks[0].named_parameters())
    assert names[0] == names[2] == names[0] and names[1] == _trained(state)
    for name in _trained(state):
        own = held(state.optimizer, weights[name])
        assert bool(own.states["exp_avg"].any()) is (name in names[0]), name
        if "param" in own.states and precision != "fp32":
            assert torch.equal(own.states["param"].view_as(weights[name]).bfloat16(), weights[name])
    assert not any(getattr(weight, "resting", None) for weight in weights.values())


# What the ranks run.


def turn_and_load(config: RunConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What this rank holds after three turns, and what it holds if each of them is a new start from a checkpoint."""
    with parallel_layout(config.parallel, 1) as parallel:
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        found = {}
        for way in ("turned", "loaded"):
            state = state_of(config, 1, parallel)
            for turn in range(3):
                for step in range(TURN):
                    batch = made_up_batch(config, TURN * turn + step, parallel)
                    train_step(state, batch, 1e-3, config, parallel, False)
                if way == "turned":
                    rotate(state, config, parallel)
                else:
                    recipe, facts = training_recipe(config), manifest_facts(config, 1)
                    saver.save(state.chunks, state.optimizer, recipe, state.step, facts)
                    checkpoint = find_checkpoint(folder, "auto", parallel)
                    state = first_state(config, state.plan, checkpoint, None, VOCAB_SIZE, parallel)
            found[way] = _all_states(state, parallel)
        return found["turned"], found["loaded"]


def _all_states(state: TrainState, parallel: Parallel) -> dict[str, Any]:
    """Weights, their optimizer states and whether they rest, and the counts of updates."""
    found: dict[str, Any] = {}
    for name, shard in sharded_weights(state.chunks, parallel).items():
        found[name] = shard.data.detach().clone()
        own = held(state.optimizer, shard.data)
        if own is not None:
            found[f"{name} elements"] = (own.elements.start, own.elements.stop)
            found |= {f"{name} {key}": value.clone() for key, value in own.states.items()}
        if shard.data.rests:
            found[f"{name} rests"] = True
    found["updates"] = sorted(
        (group["role"], group["step"], group["wd_mult"], len(group["params"])) for group in state.optimizer.param_groups
    )
    return found

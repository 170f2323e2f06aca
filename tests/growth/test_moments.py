"""Weights that go on training keep their optimizer states when the model grows; other states start at zero."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from growth.test_weights import LAYOUTS, SAVED_BY, Layers, Saved, config_of, interpolated, newest
from small_run import VOCAB_SIZE, made_up_batch, manifest_facts, read_checkpoint, small_config
from torch import Tensor
from worlds import Worlds

from megatron_step.checkpoint.load import find_checkpoint
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.growth import moments
from megatron_step.plan.matrices import rule_of
from megatron_step.plan.names import in_layer, layer_of
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import training_recipe
from megatron_step.planner.costs.held import held_chunks
from megatron_step.planner.costs.memory import growth_bytes, stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training import entry
from megatron_step.training.entry import first_state, next_stage
from megatron_step.training.state import TrainState, build_stage_model, build_state
from megatron_step.training.step import train_step

# What differs from the default between runs: what is frozen, and what becomes of adapters.
CASES: dict[str, dict[str, Any]] = {
    "merge": {},
    "keep": {"adapter": {"at_stage_end": "keep"}},
    "all trained": {"freeze": {"layers": False}},
    "in turn": {"old_layers": {"policy": "rotate", "turn_steps": 3}},
    "most frozen": {"freeze": {"norms": True, "embedding": True, "output_layer": True, "final_norm": True}},
    "muon": {"freeze": {"layers": False}, "optimizer": {"rule": "muon"}},
}

# Five layers, then six, then seven: each new one is the second from the bottom, and moves those above it.
LAYERS: Layers = interpolated(6, (0,), "mean")

# Role and count of updates of the weights' groups in the third stage: two stages of three steps are over.
_EVERYWHERE = {("base", 6), ("embedding", 6), ("base", 3), ("new_layer", 0)}
COUNTS = {
    "merge": _EVERYWHERE | {("adapter", 0)},
    "keep": _EVERYWHERE | {("adapter", 3), ("adapter", 0)},
    "all trained": _EVERYWHERE,
    "muon": _EVERYWHERE,
    "in turn": _EVERYWHERE,
    "most frozen": {("new_layer", 0), ("adapter", 0)},
}


def third_stage(model: str, case: str, layout: str, precision: str = "fp32") -> RunConfig:
    return config_of(model, layout, growth={"position": "lower"}, training={"precision": precision}, **CASES[case])


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(worlds, tmp_path_factory.mktemp("saved"))


# The oracle.


def expected_states(checkpoint: dict[str, Tensor], grown: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Every optimizer state of the third stage, by its key in a checkpoint, from one of the second stage."""
    expected = {}
    names = ["exp_avg", "exp_avg_sq"] + (["param"] if config.training.precision == "bf16" else [])
    for key, weight in grown.items():
        before = before_growth(key, checkpoint, config)
        rule = rule_of(key, weight.shape, config.optimizer.rule)
        for name in names if before is not None else []:
            if name == "exp_avg_sq" and rule == "muon":
                continue
            if before == "":
                state = weight.float() if name == "param" else torch.zeros(weight.shape)
            else:
                state = checkpoint[f"optimizer.state.{name}.{before}"]
            expected[f"optimizer.state.{name}.{key}"] = state
    return expected


def before_growth(key: str, checkpoint: dict[str, Tensor], config: RunConfig) -> str | None:
    """The key under which a weight's states are in the checkpoint; "" if they start at zero, None if it has none."""
    freeze = config.freeze
    if not key.startswith("decoder.layers."):
        frozen = {"embedding": freeze.embedding, "output_layer": freeze.output_layer}
        return None if frozen.get(key.partition(".")[0], freeze.final_norm) else key
    _, _, number, name = key.split(".", 3)
    sources, is_new = LAYERS[int(number)]
    if is_new:
        return ""
    before = f"decoder.layers.{sources[0]}.{name}"
    if ".adapter." in name:
        return before if config.adapter.at_stage_end == "keep" and before in checkpoint else ""
    # The names of a layer's norms, with those of queries and keys.
    is_norm = name.endswith(("layer_norm_weight", "q_layernorm.weight", "k_layernorm.weight"))
    freezes = freeze.layers and config.old_layer_policy != "rotate"  # states of layers that rest go on, too
    return None if (freeze.norms if is_norm else freezes) else before


def wrong_states(states: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """States that are not exactly the expected ones: nothing is computed, so nothing is rounded."""
    missing = [f"{key} is missing" for key in expected.keys() - states.keys()]
    needless = [f"{key} is of a weight that has none" for key in states.keys() - expected.keys()]
    common = expected.keys() & states.keys()
    return missing + needless + [f"{key} differs" for key in common if not torch.equal(states[key], expected[key])]


def split(checkpoint: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's weights and its optimizer states."""
    states = {key: tensor for key, tensor in checkpoint.items() if key.startswith("optimizer.")}
    return {key: tensor for key, tensor in checkpoint.items() if key not in states}, states


# The tests.


@pytest.mark.parametrize(
    ("model", "case", "layout", "precision"),
    [
        ("gated", "merge", "one", "fp32"),
        ("gated", "keep", "TP2 SP", "fp32"),
        ("gated", "keep", "DP2 distributed", "fp32"),
        ("tied", "all trained", "PP2 VPP2", "fp32"),
        ("tied", "keep", "TP2 PP2", "fp32"),
        ("plain", "most frozen", "DP2", "fp32"),
        ("plain", "keep", "PP2 uneven", "fp32"),
        ("gated", "keep", "TP2 PP2", "bf16"),
        ("gated", "all trained", "DP2 distributed", "bf16"),
        ("gated", "muon", "TP2 PP2", "bf16"),
        ("gated", "in turn", "DP2 distributed", "bf16"),
        ("tied", "in turn", "PP2 VPP2", "fp32"),
    ],
)
def test_states_and_counts_follow_what_goes_on_training(
    saved: Saved, worlds: Worlds, tmp_path: Path, model: str, case: str, layout: str, precision: str
) -> None:
    checkpoint = second_stage(saved, model, case, precision)
    config = third_stage(model, case, layout, precision)
    world = worlds(LAYOUTS[layout][0])
    counts = world.run(grow_and_save, config=config, folder=checkpoint.parent, target=tmp_path)
    weights, states = split(read_checkpoint(newest(tmp_path)))
    expected = expected_states(read_checkpoint(checkpoint), weights, config)
    assert wrong_states(states, expected) == []
    assert any(state.any() for state in expected.values()) or case == "most frozen"
    assert set().union(*counts) == COUNTS[case]


def second_stage(saved: Saved, model: str, case: str, precision: str = "fp32") -> Path:
    """A checkpoint of the second stage, written by the model's own layout, or with bf16 by two data-parallel ranks."""
    writer = "DP2 distributed" if precision == "bf16" else SAVED_BY[model]
    return newest(saved.folder(third_stage(model, case, writer, precision), writer, 1))


def test_the_optimizer_knows_all_but_frozen_weights(saved: Saved, worlds: Worlds) -> None:
    folder = second_stage(saved, "gated", "merge").parent
    ((known, frozen, names),) = worlds(1).run(
        names_in_optimizer, config=third_stage("gated", "merge", "one"), folder=folder
    )
    assert frozen
    assert known == names - frozen


def test_oracle_catches_planted_fault(saved: Saved, worlds: Worlds, tmp_path: Path) -> None:
    """States read under a layer's new number."""
    checkpoint = second_stage(saved, "tied", "keep")
    config = third_stage("tied", "keep", "TP2 PP2")
    worlds(4).run(grow_and_save, config=config, folder=checkpoint.parent, target=tmp_path, before=own_number)
    weights, states = split(read_checkpoint(newest(tmp_path)))
    wrong = wrong_states(states, expected_states(read_checkpoint(checkpoint), weights, config))
    assert {line.split("decoder.layers.")[1][0] for line in wrong} == {"2", "3", "4", "5"}


@pytest.mark.parametrize(("layout", "precision"), [("DP2 distributed", "bf16"), ("PP2 VPP2", "fp32")])
def test_the_smaller_model_is_gone_before_the_larger_one_is_built(
    worlds: Worlds, tmp_path: Path, layout: str, precision: str
) -> None:
    config = third_stage("gated", "keep", layout, precision)
    for alive, total in worlds(LAYOUTS[layout][0]).run(left_at_growth, config=config, folder=tmp_path):
        assert total > 50
        assert alive == []


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"pipeline_parallel_size": 2}), (2, {})])
def test_growth_stays_below_the_planned_peak(
    worlds: Worlds, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    """Weights dominate; a layer at a time is read beside them."""
    model = {"num_layers": 10, "hidden_size": 128, "ffn_hidden_size": 352}
    config = small_config(model=model, stages={"count": 2, "layers": [8, 2]}, parallel=layout, steps=4)
    for peak, planned, _ in worlds(world_size).run(growth_peak, config=config, folder=tmp_path):
        assert 0 < peak < planned


@pytest.mark.parametrize(
    ("world_size", "layout", "precision", "freeze"),
    [(1, {}, "bf16", {"layers": False}), (2, {"tensor_parallel_size": 2}, "fp32", {})],
)
def test_growth_needs_what_was_planned_for_it(
    worlds: Worlds, tmp_path: Path, precision: str, freeze: dict[str, Any], world_size: int, layout: dict[str, Any]
) -> None:
    """Samples so short that growth needs more than training."""
    config = small_config(
        model={"num_layers": 10, "hidden_size": 256, "ffn_hidden_size": 704, "seq_length": 8},
        stages={"count": 2, "layers": [8, 2]},
        freeze=freeze,
        parallel=layout,
        training={"precision": precision, "micro_batch_size": 1},
        steps=4,
    )
    for peak, _, planned in worlds(world_size).run(growth_peak, config=config, folder=tmp_path):
        # The plan has a layer's sums beside gradients and optimizer states, which follow later.
        assert 0.85 * planned < peak <= planned


# What the ranks run.


def grow_and_save(
    config: RunConfig, folder: Path, target: Path, before: Callable[..., str] | None = None
) -> set[tuple[str, int]]:
    """Grow the checkpoint in `folder` and save the larger model, before it has trained, in `target`.

    Returns role and count of updates of each group of this rank's weights.
    """
    with parallel_layout(config.parallel, 1) as parallel:
        found = find_checkpoint(folder, "auto", parallel)
        plan = make_plan(resolve(config, VOCAB_SIZE))
        with patch.object(moments, "key_before", before or moments.key_before):
            state = first_state(config, plan, found, None, VOCAB_SIZE, parallel)
        saver = CheckpointSaver(target, config.checkpoint, parallel)
        facts = manifest_facts(config, state.stage.index)
        saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, facts)
        return {(part["role"], part["step"]) for part in state.optimizer.param_groups if part["params"]}


def own_number(key: str, stage: Stage) -> str:
    """A fault: the key in the checkpoint of the layer that has the same number there."""
    layer = layer_of(key)
    return key if layer < 0 else in_layer(key, min(layer, 5))


def names_in_optimizer(config: RunConfig, folder: Path) -> tuple[set[str], set[str], set[str]]:
    """Names of the weights that the optimizer knows, of the frozen ones and of all."""
    with parallel_layout(config.parallel, 1) as parallel:
        found = find_checkpoint(folder, "auto", parallel)
        state = first_state(config, make_plan(resolve(config, VOCAB_SIZE)), found, None, VOCAB_SIZE, parallel)
        named = dict(state.chunks[0].named_parameters())
        known = {id(param) for group in state.optimizer.param_groups for param in group["params"]}
        known |= {id(param) for part in state.optimizer.chained_optimizers for param in part.optimizer.state}
        return (
            {name for name, param in named.items() if id(param) in known},
            {name for name, param in named.items() if not param.requires_grad},
            set(named),
        )


def trained_and_saved(config: RunConfig, stage_index: int, parallel: Parallel) -> TrainState:
    """A stage at its end, with its checkpoint where a run would have it."""
    plan = make_plan(resolve(config, VOCAB_SIZE))
    stage = plan.stages[stage_index]
    state = build_state(config, plan, stage, stage.first_step, VOCAB_SIZE, parallel)
    for step in range(stage.first_step, stage.last_step):
        train_step(state, made_up_batch(config, step, parallel), 2e-3, config, parallel, False)
    saver = CheckpointSaver(Path(config.output_dir) / "checkpoints", config.checkpoint, parallel)
    facts = manifest_facts(config, stage_index)
    saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, facts)
    return state


def left_at_growth(config: RunConfig, folder: Path) -> tuple[list[str], int]:
    """Bytes of the smaller model in memory just before the larger one is built, and its bytes in total."""
    config = replace(config, output_dir=str(folder))
    left: list[str] = []

    def build(*arguments: Any) -> Any:
        left.extend(name for name, reference in references if reference() is not None)
        return build_stage_model(*arguments)

    with parallel_layout(config.parallel, 1) as parallel:
        state = trained_and_saved(config, 1, parallel)
        references = [(name, weakref.ref(tensor.untyped_storage())) for name, tensor in tensors_of(state)]
        with patch.object(entry, "build_stage_model", build):
            grown = next_stage(state, config, make_plan(resolve(config, VOCAB_SIZE)), VOCAB_SIZE, parallel)
    assert grown.stage.index == 2
    return left, len(references)


def tensors_of(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Weights, gradient buffers and optimizer states of this rank, with names."""
    for chunk in state.chunks:
        yield from chunk.named_parameters()
        for buffer in chunk.buffers:
            yield "gradient buffer", buffer.grad_data
    for part in state.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for param in part.get_parameters():
            yield "main weight", param
        for states in part.optimizer.state.values():
            yield from ((name, tensor) for name, tensor in states.items() if isinstance(tensor, Tensor))


def growth_peak(config: RunConfig, folder: Path) -> tuple[int, int, int]:
    """Measured peak of this rank while its model grows, the planned one of training in the stage that follows, and
    the planned one of growth, in bytes."""
    config = replace(config, output_dir=str(folder))
    with parallel_layout(config.parallel, 1) as parallel:
        plan = make_plan(resolve(config, VOCAB_SIZE))
        grown = next_stage(trained_and_saved(config, 0, parallel), config, plan, VOCAB_SIZE, parallel)
        stage = plan.stages[1]
        planned = stage_memory(resolve(config, VOCAB_SIZE, parallel.dp_size), stage)[parallel.pp_rank]
        growing = growth_bytes(held_chunks(resolve(config, VOCAB_SIZE), stage)[parallel.pp_rank][0].parameters, stage)
    return grown.growth_peak_bytes, planned.peak_bytes, planned.model_state_bytes + growing

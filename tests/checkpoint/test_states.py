"""States of one recipe load into another in any layout; nothing that has room is rounded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import TIED, VOCAB_SIZE, loaded_state, made_up_batch, manifest_facts, read_checkpoint, small_config
from worlds import Worlds

from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.states import RECIPES, training_recipe
from megatron_step.training.state import initial_state
from megatron_step.training.step import train_step

TP2: dict[str, Any] = {"tensor_parallel_size": 2}


def _config(states: str, layout: dict[str, Any], **optimizer: Any) -> RunConfig:
    optimizer = {"states": states, **optimizer}
    return small_config(model=TIED, training={"precision": "bf16"}, optimizer=optimizer, parallel=layout)


def test_exact_and_full_states_are_the_same_numbers(worlds: Worlds, tmp_path: Path) -> None:
    """full in TP2 DP2, exact in PP2, and full again in one process: every bit is back."""
    first, second, third = (tmp_path / name for name in ("full", "exact", "again"))
    worlds(4).run(train_and_save, config=_config("full", TP2), folder=first)
    worlds(2).run(convert, config=_config("exact", {"pipeline_parallel_size": 2}), folder=first, again=second)
    worlds(1).run(convert, config=_config("full", {}), folder=second, again=third)
    expected, found = read_checkpoint(first / "step_00000003"), read_checkpoint(third / "step_00000003")
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []


@pytest.mark.parametrize(
    ("states", "optimizer", "main_error"),
    [("compact", {}, 2.0**-23), ("compact", {"correction_bits": 8}, 2.0**-15), ("smallest", {}, 2.0**-8)],
    ids=["compact", "compact 8 bits", "smallest"],
)
def test_what_has_no_room_is_rounded_to_nearest(
    worlds: Worlds, tmp_path: Path, states: str, optimizer: dict[str, Any], main_error: float
) -> None:
    """In TP2 DP2, where ranks share blocks, and back to full states in one process.

    A tie between two bf16 weights that rounded to the lower one leaves one more than 16 bits hold.
    """
    first, second, third = (tmp_path / name for name in ("full", "compact", "again"))
    worlds(1).run(train_and_save, config=_config("full", {}), folder=first)
    worlds(4).run(convert, config=_config(states, TP2, **optimizer), folder=first, again=second)
    worlds(1).run(convert, config=_config("full", {}), folder=second, again=third)
    expected, found = read_checkpoint(first / "step_00000003"), read_checkpoint(third / "step_00000003")
    for key, tensor in expected.items():
        if ".param." in key:
            assert ((found[key] - tensor).abs() <= main_error * tensor.abs()).all(), key
        elif ".exp_avg" in key and tensor.dim() == 2:
            assert not torch.equal(found[key], tensor)
            # Half the distance between neighbours is at most the share of a step at a block's peak.
            levels = 127 if ".exp_avg." in key else 255 / 2
            error = (found[key] - tensor).abs().amax(1)
            assert (error <= tensor.abs().amax(1) / levels * 1.02).all(), key
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(("states", "error"), [("exact", 0.0), ("compact", 1 / 127)])
def test_muons_momentum_goes_into_another_recipe(worlds: Worlds, tmp_path: Path, states: str, error: float) -> None:
    """In TP2 DP2, where ranks share blocks; main weights have room but for ties that rounded down."""
    first, second, third = (tmp_path / name for name in ("full", "other", "again"))
    worlds(1).run(train_and_save, config=_config("full", {}, rule="muon"), folder=first)
    worlds(4).run(convert, config=_config(states, TP2, rule="muon"), folder=first, again=second)
    worlds(1).run(convert, config=_config("full", {}, rule="muon"), folder=second, again=third)
    expected, found = read_checkpoint(first / "step_00000003"), read_checkpoint(third / "step_00000003")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if ".exp_avg." in key and "layers" in key and tensor.dim() == 2:
            assert ((found[key] - tensor).abs().amax(1) <= 1.02 * error * tensor.abs().amax(1)).all(), key
        elif ".param." in key:
            assert ((found[key] - tensor).abs() <= 2.0**-23 * tensor.abs()).all(), key


def test_a_blocks_codes_do_not_depend_on_the_layout(worlds: Worlds, tmp_path: Path) -> None:
    worlds(1).run(train_and_save, config=_config("full", {}), folder=tmp_path / "full")
    found = []
    for size, layout in ((1, {}), (4, TP2)):
        again = tmp_path / str(size)
        worlds(size).run(convert, config=_config("compact", layout), folder=tmp_path / "full", again=again)
        found.append(read_checkpoint(again / "step_00000003"))
    assert found[0].keys() == found[1].keys()
    assert [key for key, tensor in found[0].items() if not torch.equal(tensor, found[1][key])] == []


def test_a_recipe_says_what_it_rounds() -> None:
    assert RECIPES["exact"].rounds(RECIPES["full"]) == RECIPES["full"].rounds(RECIPES["smallest"]) == ""
    assert RECIPES["compact"].rounds(RECIPES["full"]) == "the moments of matrices are rounded to 8 bits"
    assert RECIPES["smallest"].rounds(RECIPES["compact"]) == "main weights are rounded to 16 bits"


# What the ranks run.


def train_and_save(config: RunConfig, folder: Path) -> None:
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        for step in range(3):
            train_step(state, made_up_batch(config, step, parallel), 1e-2, config, parallel, False)
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, manifest_facts(config))


def convert(config: RunConfig, folder: Path, again: Path) -> None:
    """Load the newest checkpoint into the recipe and the layout of `config`, and save it again."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = loaded_state(config, folder, parallel)
        saver = CheckpointSaver(again, config.checkpoint, parallel)
        saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, manifest_facts(config))

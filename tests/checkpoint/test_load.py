import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import TIED, VOCAB_SIZE, loaded_state, made_up_batch, manifest_facts, read_checkpoint, small_config
from worlds import WorldError, Worlds

from megatron_step.checkpoint.load import find_checkpoint
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.plan.states import training_recipe
from megatron_step.training.state import TrainState, initial_state
from megatron_step.training.step import train_step


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3, written by two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("saved")
    worlds(2).run(train_and_save, config=small_config(checkpoint={"keep": 0}), folder=folder, steps=3)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def biggest_file(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def cut_off(checkpoint: Path) -> None:
    path = biggest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-100])


def flip_bit(checkpoint: Path) -> None:
    path = biggest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut_off, "bytes instead of"),
    "flipped bit": (flip_bit, "checksum does not match"),
    "a file is missing": (lambda path: biggest_file(path).unlink(), "cannot be read: No such file"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "no index": (lambda path: (path / ".metadata").unlink(), "cannot be read: No such file"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_damaged_newest_is_passed_over_and_named(worlds: Worlds, folder: Path, name: str) -> None:
    spoil, words = SPOILT[name]
    spoil(folder / "step_00000003")
    spoil(folder / "step_00000002")
    for path, passed_over in worlds(2).run(find, folder=folder):
        assert path == folder / "step_00000001"
        assert len(passed_over) == 2
        for step, problem in zip((3, 2), passed_over):
            assert words in problem
            assert f"step_0000000{step}" in problem


def test_no_checkpoint_is_whole(worlds: Worlds, folder: Path) -> None:
    for step in (1, 2, 3):
        cut_off(folder / f"step_0000000{step}")
    with pytest.raises(WorldError, match=r"no checkpoint in .* can be used .*choose another output_dir"):
        worlds(2).run(find, folder=folder)


def test_what_resume_names(worlds: Worlds, folder: Path) -> None:
    world, named = worlds(2), folder / "step_00000002"
    assert world.run(find, folder=folder) == [(folder / "step_00000003", [])] * 2
    assert world.run(find, folder=folder, resume="none") == [None] * 2
    assert world.run(find, folder=folder / "nothing here") == [None] * 2
    assert world.run(find, folder=folder, resume=str(named)) == [(named, [])] * 2
    with pytest.raises(WorldError, match="FileNotFoundError"):
        world.run(find, folder=folder, resume=str(folder / "step_00000009"))
    flip_bit(named)
    with pytest.raises(WorldError, match=r"DamagedCheckpointError: .*checksum"):
        world.run(find, folder=folder, resume=str(named))


@pytest.mark.parametrize("states", ["fp32", "full", "exact", "compact", "smallest"])
def test_weights_and_optimizer_states_come_back_in_every_layout(worlds: Worlds, tmp_path: Path, states: str) -> None:
    """Loaded in another layout and saved from there, every tensor is what it was."""
    settings: dict[str, Any] = {"training": {"precision": "fp32"}}
    if states != "fp32":
        settings = {"training": {"precision": "bf16"}, "optimizer": {"states": states}}
    first = small_config(model=TIED, parallel={"tensor_parallel_size": 2}, **settings)
    worlds(4).run(train_and_save, config=first, folder=tmp_path / "first", steps=2)
    expected = read_checkpoint(tmp_path / "first" / "step_00000002")
    for number, (size, layout) in enumerate(
        [
            (1, {"distributed_optimizer": False}),
            (2, {}),
            (2, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
            (8, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True}),
        ]
    ):
        config = small_config(model=TIED, parallel=layout, **settings)
        again = tmp_path / str(number)
        counts = worlds(size).run(load, config=config, folder=tmp_path / "first", again=again)
        tensors = read_checkpoint(again / "step_00000002")
        assert tensors.keys() == expected.keys()
        assert [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[key])] == [], layout
        assert {count for rank in counts for count in rank} == {2}, "the updates that the moments have seen"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_layers": 6}, r"has no tensor decoder\.layers\.4"),
        ({"hidden_size": 32}, r"in shape \[256, 64\]; the model needs \[256, 32\]"),
        ({"ffn_hidden_size": 128}, r"linear_fc1.*in shape \[192, 64\]; the model needs \[256, 64\]"),
        ({"qk_norm": True}, "has no tensor .*q_layernorm"),
    ],
)
def test_another_model_is_refused(worlds: Worlds, saved: Path, model: dict[str, Any], words: str) -> None:
    config = small_config(model={"num_query_groups": 2, **model}, parallel={"tensor_parallel_size": 2})
    with pytest.raises(WorldError, match=f"ValueError: .*{words}"):
        worlds(2).run(load, config=config, folder=saved)


def test_another_precision_is_refused(worlds: Worlds, saved: Path) -> None:
    with pytest.raises(WorldError, match=r"ValueError: .* has no tensor .*another model or precision"):
        worlds(2).run(load, config=small_config(training={"precision": "bf16"}), folder=saved)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_checkpoint_with_nan_is_refused(worlds: Worlds, tmp_path: Path, where: str) -> None:
    config = small_config(parallel={"pipeline_parallel_size": 2})
    worlds(2).run(train_and_save, config=config, folder=tmp_path, steps=1, spoil=where)
    key = {"weight": "decoder.layers.3", "moment": "optimizer.state.exp_avg_sq.decoder.layers.3"}[where]
    with pytest.raises(WorldError, match=f"ValueError: .*infinite or NaN values in {key}.*--resume PATH"):
        worlds(2).run(load, config=replace(config, parallel=small_config().parallel), folder=tmp_path)


# What the ranks run.


def train_and_save(config: RunConfig, folder: Path, steps: int, spoil: str | None = None) -> None:
    """Save after each step."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = initial_state(config, VOCAB_SIZE, parallel)
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        for step in range(steps):
            train_step(state, made_up_batch(config, step, parallel), 1e-2, config, parallel, False)
            if spoil is not None and parallel.pp_rank == 1:
                spoil_last_layer(state, spoil)
            save(saver, state, config, parallel)


def spoil_last_layer(state: TrainState, where: str) -> None:
    weight = state.chunks[-1].module.decoder.layers[-1].mlp.linear_fc2.weight
    if where == "weight":
        weight.data[3, 5] = torch.nan
    else:
        (part,) = state.optimizer.chained_optimizers
        part._get_main_param_and_optimizer_states(weight)["exp_avg_sq"][7] = torch.inf


def save(saver: CheckpointSaver, state: TrainState, config: RunConfig, parallel: Parallel) -> None:
    facts = manifest_facts(config)
    saver.save(state.chunks, state.optimizer, training_recipe(config), state.step, facts)


def find(folder: Path, resume: str = "auto") -> tuple[Path, list[str]] | None:
    with parallel_layout(small_config().parallel, 1) as parallel:
        found = find_checkpoint(folder, resume, parallel)
        return None if found is None else (found.path, found.passed_over)


def load(config: RunConfig, folder: Path, again: Path | None = None) -> list[int]:
    """Load the newest checkpoint, and save it `again` in this layout; returns each group's count of updates."""
    with parallel_layout(config.parallel, 1) as parallel:
        state = loaded_state(config, folder, parallel, training_recipe(config))
        if again is not None:
            save(CheckpointSaver(again, config.checkpoint, parallel), state, config, parallel)
        return [int(group["step"]) for group in state.optimizer.param_groups]

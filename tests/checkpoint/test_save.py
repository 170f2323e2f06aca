import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from small_run import VOCAB_SIZE, made_up_batch, manifest_facts, read_checkpoint, small_config, whole_tensors
from worlds import WorldError, Worlds

from megatron_step.checkpoint.directory import list_checkpoints
from megatron_step.checkpoint.load import load_weights
from megatron_step.checkpoint.manifest import damage, read_manifest
from megatron_step.checkpoint.save import CheckpointSaver, SaveError
from megatron_step.checkpoint.states import load_states
from megatron_step.config.data import DataConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.model.build import sharded_weights
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import training_recipe
from megatron_step.planner.costs.held import held_chunks
from megatron_step.planner.costs.memory import HostMemory, host_memory
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_host_peak
from megatron_step.training.run import run
from megatron_step.training.state import TrainState, build_state, initial_state
from megatron_step.training.step import train_step

TP2 = {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("size", "layout", "asynchronous", "precision"),
    [
        (2, {}, False, "bf16"),
        (2, {}, True, "fp32"),
        (2, TP2, False, "fp32"),
        (2, TP2, True, "bf16"),
        (4, {**TP2, "pipeline_parallel_size": 2}, True, "bf16"),
    ],
)
def test_checkpoint_is_a_snapshot(
    worlds: Worlds, tmp_path: Path, size: int, layout: dict[str, Any], asynchronous: bool, precision: str
) -> None:
    """It holds the weights at the time of the save, though training went on before all was written."""
    config = small_config(parallel=layout, checkpoint={"asynchronous": asynchronous}, training={"precision": precision})
    weights, visible = worlds(size).run(save_and_train_on, config=config, folder=tmp_path)[0]
    assert visible is not asynchronous  # an asynchronous checkpoint is published by `finish`
    ((step, path),) = list_checkpoints(tmp_path)
    assert step == 2
    manifest = read_manifest(path)
    assert damage(path, manifest.files, manifest.files) is None
    assert set(manifest.files) == {entry.name for entry in path.iterdir()} - {"manifest.json"}
    tensors = read_checkpoint(path)
    for key, weight in weights.items():
        assert torch.equal(tensors[key].float(), weight), key
        assert tensors[f"optimizer.state.exp_avg_sq.{key}"].dtype == torch.float32
    assert len(tensors) == len(weights) * (4 if precision == "bf16" else 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]


def test_saves_and_loads_need_what_was_planned_for_the_host(worlds: Worlds, tmp_path: Path) -> None:
    """Two stages: all layers trained, and most of them frozen. On the CPU nothing is copied to write it."""
    cases: list[dict[str, Any]] = [
        {"checkpoint": {"asynchronous": False}},
        {"checkpoint": {"asynchronous": True}, "training": {"precision": "bf16"}},
        {"parallel": {"distributed_optimizer": False}, "training": {"precision": "bf16"}},
    ]
    first, second = worlds(2).run(save_and_measure, cases=cases, folder=tmp_path)
    largest = 256 * 256 * 4  # what ranks say to each other is less
    for kept, saving, written, loading, planned in first:
        assert saving < largest
        assert planned.load_bytes / 4 < loading <= planned.load_bytes
        if kept:
            assert 0.95 * planned.save_bytes < written <= 1.01 * planned.save_bytes
        else:
            assert saving <= planned.save_bytes < written / 4
    for _, saving, _, loading, planned in second:
        assert saving < largest
        assert loading <= planned.load_bytes


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_what_the_policy_says_is_kept(worlds: Worlds, tmp_path: Path, asynchronous: bool) -> None:
    checkpoint = {"keep": 2, "keep_every": 4, "asynchronous": asynchronous}
    worlds(2).run(save_nine_times, config=small_config(checkpoint=checkpoint), folder=tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 8, 9]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_save_leaves_the_one_before(worlds: Worlds, tmp_path: Path, asynchronous: bool) -> None:
    """Processes that are killed while they save leave whole checkpoints, and leftovers that the next run removes."""
    world, config = worlds(2), small_config(checkpoint={"asynchronous": asynchronous, "keep": 2})
    found_leftovers = 0
    for _ in range(4):
        world.start(save_for_ever, config=config, folder=tmp_path)
        deadline = monotonic() + 60
        while not list(tmp_path.glob(".saving_*/*")):
            assert monotonic() < deadline, "no rank began to save"
        world.kill()
        found_leftovers += bool(list(tmp_path.glob(".saving_*")))
        for _, path in list_checkpoints(tmp_path):
            files = read_manifest(path).files
            assert damage(path, files, files) is None
    assert found_leftovers
    world.run(open_saver, config=config, folder=tmp_path)
    assert not list(tmp_path.glob(".saving_*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: room for the 16 MiB that a save asks for in reserve, and for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("filled", ["before", "during"])
def test_run_goes_on_when_the_disk_is_full(
    worlds: Worlds, small_data: DataConfig, small_disk: Path, filled: str, asynchronous: bool
) -> None:
    """Saves that fail in between are reported; the last one's failure is the run's; what was saved before stays."""
    config = small_config(
        str(small_disk),
        data=small_data,
        steps=12,
        checkpoint={"interval": 2, "keep": 0, "asynchronous": asynchronous},
        parallel={"distributed_optimizer": False},
    )
    (small_disk / "ballast").write_bytes(bytes({"before": 1, "during": 17}[filled] << 20))
    case = run_on_small_disk if filled == "before" else run_without_looking_at_the_room
    world = worlds(2)
    error = world.run(case, config=config)[0]
    assert "cannot save the checkpoint of step 12" in error
    assert re.search(
        "it needs 18 MiB, but only 16 MiB are free" if filled == "before" else "; 0 MiB are free", error
    ), error
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12
    saved = list_checkpoints(small_disk / "checkpoints")
    assert 1 <= len(saved) < 6
    for _, path in saved:
        files = read_manifest(path).files
        assert damage(path, files, files) is None
    assert not list((small_disk / "checkpoints").glob(".saving_*"))

    # With room again, the run goes on from the last good checkpoint to its end.
    (small_disk / "ballast").unlink()
    for _, path in saved[:-1]:
        shutil.rmtree(path)
    config = replace(config, checkpoint=replace(config.checkpoint, interval=0))
    world.run(run_to_the_end, config=config)
    assert list_checkpoints(small_disk / "checkpoints")[-1][0] == 12


def test_folder_that_cannot_be_written(worlds: Worlds, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(WorldError, match="SaveError: cannot save the checkpoint of step 2"):
        worlds(2).run(save_and_train_on, config=small_config(), folder=tmp_path / "checkpoints")


# What the ranks run.


def two_steps(config: RunConfig, parallel: Parallel) -> TrainState:
    state = initial_state(config, VOCAB_SIZE, parallel)
    for step in range(2):
        train_step(state, made_up_batch(config, step, parallel), 1e-2, config, parallel, False)
    return state


def save(saver: CheckpointSaver, state: TrainState, config: RunConfig, step: int) -> None:
    saver.save(state.chunks, state.optimizer, training_recipe(config), step, manifest_facts(config))


def save_and_train_on(config: RunConfig, folder: Path) -> tuple[dict[str, torch.Tensor] | None, bool]:
    with parallel_layout(config.parallel, 1) as parallel:
        state = two_steps(config, parallel)
        weights = whole_tensors(state, parallel, lambda weight: weight.detach())
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        save(saver, state, config, 2)
        visible = bool(list_checkpoints(folder))
        for step in range(3):
            train_step(state, made_up_batch(config, step, parallel), 1e-2, config, parallel, False)
        saver.finish()
        return weights, visible


def save_nine_times(config: RunConfig, folder: Path) -> None:
    with parallel_layout(config.parallel, 1) as parallel:
        state = two_steps(config, parallel)
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        for step in range(1, 10):
            save(saver, state, config, step)
        saver.finish()


def save_for_ever(config: RunConfig, folder: Path) -> None:
    with parallel_layout(config.parallel, 1) as parallel:
        state = two_steps(config, parallel)
        saver = CheckpointSaver(folder, config.checkpoint, parallel)
        newest = list_checkpoints(folder)
        step = newest[-1][0] if newest else 0
        while True:
            step += 1
            save(saver, state, config, step)


def open_saver(config: RunConfig, folder: Path) -> None:
    with parallel_layout(config.parallel, 1) as parallel:
        CheckpointSaver(folder, config.checkpoint, parallel)


def run_on_small_disk(config: RunConfig) -> str:
    try:
        run(config)
    except SaveError as error:
        return str(error)
    raise AssertionError("the disk did not fill up")


def run_without_looking_at_the_room(config: RunConfig) -> str:
    """Fill the disk after the saver has checked the free space, as another program might."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_step.checkpoint.save._SPARE_BYTES", -(1 << 30))
        return run_on_small_disk(config)


def run_to_the_end(config: RunConfig) -> None:
    assert run(config)


def save_and_measure(cases: list[dict[str, Any]], folder: Path) -> list[tuple[bool, int, int, int, HostMemory]]:
    """For each stage of each case: whether the save is asynchronous, the bytes of host memory that it took and the
    bytes that this rank wrote, those that a load of it took, and what was planned."""
    compared = []
    for number, case in enumerate(cases):
        model = {"hidden_size": 256, "ffn_hidden_size": 352}
        config = small_config(model=model, stages={"count": 2, "layers": [3, 1]}, **case)
        plan = make_plan(resolve(config, VOCAB_SIZE))
        with parallel_layout(config.parallel, seed=1) as parallel:
            for stage in plan.stages:
                state = build_state(config, plan, stage, stage.first_step, VOCAB_SIZE, parallel)
                train_step(state, made_up_batch(config, 0, parallel), 1e-4, config, parallel, False)
                saver = CheckpointSaver(folder / f"{number}_{stage.index}", config.checkpoint, parallel)
                what = (state.chunks, state.optimizer, training_recipe(config), 1, manifest_facts(config))
                written, saving = measure_host_peak(lambda: saver.save(*what))  # noqa: B023
                saver.finish()
                ((_, path),) = list_checkpoints(folder / f"{number}_{stage.index}")
                _, weights = measure_host_peak(lambda: load_weights(path, state.chunks, parallel))  # noqa: B023
                recipe, trained = training_recipe(config), sharded_weights(state.chunks, parallel)
                into = (path, state.optimizer, trained, recipe, recipe, parallel)
                _, loading = measure_host_peak(lambda: load_states(*into))  # noqa: B023
                loading = max(loading, weights)
                parameters = held_chunks(resolve(config, VOCAB_SIZE), stage)[0][0].parameters
                planned = host_memory(resolve(config, VOCAB_SIZE, parallel.dp_size), parameters)
                compared.append((config.checkpoint.asynchronous, saving, written, loading, planned))
                state.release()
    return compared

"""A run that is stopped or killed and started again computes what a run that was not computes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_files
from run_files import assert_close_losses, assert_same_checkpoint, close, equal, losses
from small_run import small_config
from worlds import WorldError, Worlds

from megatron_step.checkpoint.directory import list_checkpoints
from megatron_step.config.data import DataConfig
from megatron_step.config.load import config_text
from megatron_step.config.run import RampUpConfig, RunConfig
from megatron_step.engine.signals import EXIT_STOPPED
from megatron_step.training.run import run

TP2_PP2 = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
STEPS = 30

# World size, and what differs from the default config.
KILLED: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"parallel": {"distributed_optimizer": False}}),
    "DP2 distributed": (2, {}),
    "bf16 DP2 distributed asynchronous": (2, {"training": {"precision": "bf16"}, "checkpoint": {"asynchronous": True}}),
    "bf16 TP2 PP2 asynchronous": (
        4,
        {"parallel": TP2_PP2, "training": {"precision": "bf16"}, "checkpoint": {"asynchronous": True}},
    ),
    "compact TP2 PP2 asynchronous": (
        4,
        {
            "parallel": TP2_PP2,
            "training": {"precision": "bf16"},
            "checkpoint": {"asynchronous": True},
            "optimizer": {"states": "compact"},
        },
    ),
    "smallest DP2 distributed, growing under one schedule": (
        2,
        {
            "training": {"precision": "bf16"},
            "optimizer": {"states": "smallest"},
            "stages": {"count": 2, "layers": [2, 2], "steps": STEPS, "shares": [0.5, 0.5]},
            "schedule": {"scope": "run"},
            "old_layers": {"policy": "trained"},
        },
    ),
    "muon compact TP2 DP2, growing": (
        4,
        {
            "parallel": {"tensor_parallel_size": 2},
            "training": {"precision": "bf16"},
            "optimizer": {"rule": "muon", "states": "compact", "correction_bits": 8},
            "stages": {"count": 2, "layers": [2, 2], "steps": STEPS // 2},
        },
    ),
    "ramped batch": (2, {"training": {"ramp_up": RampUpConfig(start=4, increment=4, samples=60)}}),
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_run_goes_on_bit_for_bit(worlds: Worlds, small_data: DataConfig, tmp_path: Path, name: str) -> None:
    size, sections = KILLED[name]
    config = run_config(tmp_path / "straight", small_data, **sections)
    world = worlds(size)
    assert world.run(train, config=config) == [True] * size

    config = replace(config, output_dir=str(tmp_path / "killed"))
    world.start(train, config=config)
    wait_for_step(config, 12)
    world.kill()
    assert 12 <= last_step(config) < STEPS
    assert world.run(train, config=config) == [True] * size

    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert_same_checkpoint(tmp_path / "killed", tmp_path / "straight", equal)


ROTATES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one process, inside a turn": (1, 4, {"parallel": {"distributed_optimizer": False}}),
    "one process, reset in a random order": (
        1,
        4,
        {"old_layers": {"policy": "rotate", "turn_steps": 4, "moments": "reset", "order": "random"}},
    ),
    "compact TP2 PP2, at a turn": (
        4,
        5,
        {"parallel": TP2_PP2, "training": {"precision": "bf16"}, "optimizer": {"states": "compact"}},
    ),
    "full DP2 distributed, asynchronous, inside a turn": (
        2,
        4,
        {"training": {"precision": "bf16"}, "checkpoint": {"asynchronous": True, "interval": 5}},
    ),
}
"""World size, steps of a turn, and what differs from the default config. Checkpoints come every five steps."""


@pytest.mark.parametrize("name", ROTATES)
def test_a_run_killed_between_turns_goes_on_bit_for_bit(
    worlds: Worlds, small_data: DataConfig, tmp_path: Path, name: str
) -> None:
    """Over two growths, so that states that wait on the host go into the next stage."""
    size, turn_steps, sections = ROTATES[name]
    config = run_config(tmp_path / "straight", small_data, **{**_rotating(turn_steps), **sections})
    world = worlds(size)
    assert world.run(train, config=config) == [True] * size

    config = replace(config, output_dir=str(tmp_path / "killed"))
    for step in (13, 23):  # after the checkpoints of steps 10 and 20, each in another stage
        world.start(train, config=config)
        wait_for_step(config, step)
        world.kill()
        assert step <= last_step(config) < 30
    assert world.run(train, config=config) == [True] * size

    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert_same_checkpoint(tmp_path / "killed", tmp_path / "straight", equal)
    turns = [line["turn"] for line in metrics(config) if "turn" in line]
    assert turns == ([2, 3] * 2 if turn_steps == 4 else [2, 2])


def _rotating(turn_steps: int) -> dict[str, Any]:
    return {
        "model": {"num_layers": 6, "num_query_groups": 2},
        "stages": {"count": 3, "layers": [4, 1, 1], "steps": STEPS // 3, "grow_at": 1.0},
        "old_layers": {"policy": "rotate", "turn_steps": turn_steps},
    }


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {}), (2, {"tensor_parallel_size": 2})])
def test_a_rotation_goes_on_in_another_layout_to_rounding(
    worlds: Worlds, rotated_at_tp2_pp2: RunConfig, tmp_path: Path, size: int, layout: dict[str, Any]
) -> None:
    """The layers of each turn stay those of the layout in which the stage began."""
    straight = Path(rotated_at_tp2_pp2.output_dir)
    shutil.copytree(straight / "checkpoints" / "step_00000015", tmp_path / "checkpoints" / "step_00000015")
    config = replace(rotated_at_tp2_pp2, output_dir=str(tmp_path), parallel=small_config(parallel=layout).parallel)
    worlds(size).run(train, config=config)
    assert_close_losses(losses(tmp_path), losses(straight)[15:])
    assert_same_checkpoint(tmp_path, straight, close)


@pytest.fixture(scope="module")
def rotated_at_tp2_pp2(worlds: Worlds, small_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two stages with turns at the steps 14, 18 and so on."""
    sections = {**_rotating(4), "stages": {"count": 2, "layers": [5, 1], "steps": [10, 20], "grow_at": 1.0}}
    config = run_config(
        tmp_path_factory.mktemp("rotated"), small_data, parallel=TP2_PP2, checkpoint={"keep": 0}, **sections
    )
    worlds(4).run(train, config=config)
    return config


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, {}), (2, {"pipeline_parallel_size": 2}), (1, {}), (2, {"tensor_parallel_size": 2, "sequence_parallel": True})],
)
def test_other_layout_goes_on_to_rounding(
    worlds: Worlds, saved_at_tp2_pp2: RunConfig, tmp_path: Path, size: int, layout: dict[str, Any]
) -> None:
    straight = Path(saved_at_tp2_pp2.output_dir)
    shutil.copytree(straight / "checkpoints" / "step_00000015", tmp_path / "checkpoints" / "step_00000015")
    config = replace(saved_at_tp2_pp2, output_dir=str(tmp_path), parallel=small_config(parallel=layout).parallel)
    worlds(size).run(train, config=config)
    assert_close_losses(losses(tmp_path), losses(straight)[15:])
    assert_same_checkpoint(tmp_path, straight, close)


@pytest.fixture(scope="module")
def saved_at_tp2_pp2(worlds: Worlds, small_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("tp2_pp2")
    config = run_config(folder, small_data, parallel=TP2_PP2, checkpoint={"keep": 0})
    worlds(4).run(train, config=config)
    return config


def test_stopped_run_goes_on_through_many_layouts(worlds: Worlds, small_data: DataConfig, tmp_path: Path) -> None:
    """SIGTERM or SIGUSR1 to any one rank saves and stops all; each time the run goes on in another layout."""
    config = run_config(tmp_path / "straight", small_data, checkpoint={"interval": 0})
    worlds(1).run(train, config=config)
    config = replace(config, output_dir=str(tmp_path / "stopped"))
    legs: list[tuple[int, dict[str, Any]]] = [
        (2, {"overlap_grad_reduce": True}),
        (4, {**TP2_PP2, "sequence_parallel": True}),
        (2, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
        (8, {**TP2_PP2, "recompute": "full"}),
        (2, {"distributed_optimizer": False}),
    ]
    for leg, (size, layout) in enumerate(legs):
        before = last_step(config)
        world = worlds(size)
        world.start(train, config=replace(config, parallel=small_config(parallel=layout).parallel))
        wait_for_step(config, before + 2)
        world.signal(leg % size, signal.SIGTERM if leg % 2 else signal.SIGUSR1)
        assert world.join() == [False] * size
        assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1][0] == last_step(config) < STEPS
    assert worlds(1).run(train, config=config) == [True]
    assert_close_losses(losses(tmp_path / "stopped"), losses(tmp_path / "straight"))
    assert_same_checkpoint(tmp_path / "stopped", tmp_path / "straight", close)


@pytest.fixture(scope="module")
def stopped(worlds: Worlds, small_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was asked to stop after a few steps."""
    config = run_config(tmp_path_factory.mktemp("stopped"), small_data, checkpoint={"interval": 0})
    worlds(1).start(train, config=config)
    wait_for_step(config, 3)
    worlds(1).signal(0, signal.SIGTERM)
    assert worlds(1).join() == [False]
    return config


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("training", {"global_batch_size": 16}, r"training\.global_batch_size 8 -> 16"),
        ("training", {"precision": "bf16"}, r"training\.precision fp32 -> bf16"),
        ("model", {"rope_theta": 5e5}, r"model\.rope_theta 10000\.0 -> 500000\.0"),
        ("model", {"num_layers": 2}, r"model\.num_layers 4 -> 2"),
        ("data", {"seed": 2}, r"data\.seed: 1 -> 2"),
        ("data", {"split": (80, 20)}, r"data\.split.*0\.9.*0\.8"),
        ("stages", {"steps": 40}, "last step of stage 1 30 -> 40"),
        ("stages", {"steps": 2}, "last step of stage 1 30 -> 2"),
        ("stages", {"count": 2}, "stages.count 1 -> 2"),
    ],
)
def test_another_run_is_refused(
    worlds: Worlds, stopped: RunConfig, section: str, change: dict[str, Any], words: str
) -> None:
    before = tree(Path(stopped.output_dir))
    config = replace(stopped, **{section: replace(getattr(stopped, section), **change)})
    with pytest.raises(WorldError, match=f"ValueError: .*{words}"):
        worlds(1).run(train, config=config)
    assert tree(Path(stopped.output_dir)) == before


def test_changed_text_is_refused(worlds: Worlds, stopped: RunConfig, small_data: DataConfig, tmp_path: Path) -> None:
    """The same corpus at another place goes; with one token changed it does not."""
    moved = shutil.copytree(Path(small_data.tokenizer).parent, tmp_path / "data")
    data = replace(small_data, train=[(1.0, str(moved / "corpus"))], tokenizer=str(moved / "tokenizer.model"))
    shutil.copytree(stopped.output_dir, tmp_path / "run")
    config = replace(stopped, output_dir=str(tmp_path / "run"), data=data)
    worlds(1).start(train, config=config)
    wait_for_step(config, last_step(stopped) + 1)
    worlds(1).signal(0, signal.SIGUSR1)
    assert worlds(1).join() == [False]

    content = bytearray((moved / "corpus.bin").read_bytes())
    content[1000:1002], content[1002:1004] = content[1002:1004], content[1000:1002]
    assert content != (moved / "corpus.bin").read_bytes()
    (moved / "corpus.bin").write_bytes(content)
    with pytest.raises(WorldError, match=r"ValueError: the data differs from .*data\.train\[0\]\.bin\.hash"):
        worlds(1).run(train, config=config)


def test_command_goes_on_after_every_signal(worlds: Worlds, small_data: DataConfig, tmp_path: Path) -> None:
    config = run_config(tmp_path / "straight", small_data, checkpoint={"asynchronous": True})
    config = replace(config, stages=replace(config.stages, steps=60))
    worlds(1).run(train, config=config)
    config = replace(config, output_dir=str(tmp_path / "stopped"))
    command = [sys.executable, "-m", "megatron_step.train", "--config", write_config(tmp_path, config)]
    for number, status in (
        (signal.SIGTERM, EXIT_STOPPED),
        (signal.SIGUSR1, EXIT_STOPPED),
        (signal.SIGKILL, -signal.SIGKILL),
    ):
        before = last_step(config)
        process = start_command(command)
        wait_for_step(config, before + 7, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        assert "Traceback" not in output
        if status == EXIT_STOPPED:
            assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1][0] == last_step(config)
    process = start_command(command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert_same_checkpoint(tmp_path / "stopped", tmp_path / "straight", equal)


def test_torchrun_passes_the_signal_on(worlds: Worlds, small_data: DataConfig, tmp_path: Path) -> None:
    config = run_config(tmp_path / "straight", small_data)
    worlds(2).run(train, config=config)
    config = replace(config, output_dir=str(tmp_path / "stopped"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "megatron_step.train", "--config", write_config(tmp_path, config)]
    process = start_command(command)
    wait_for_step(config, 7, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1][0] == last_step(config) < STEPS
    process = start_command(command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def train(config: RunConfig) -> bool:
    """Run the case on each rank."""
    return run(config)


def run_config(output: Path, data: DataConfig, **sections: Any) -> RunConfig:
    return small_config(str(output), data=data, steps=STEPS, evaluation={"interval": 10}, **sections)


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_config(folder: Path, config: RunConfig) -> str:
    path = folder / "config.yaml"
    path.write_text(config_text(config), encoding="utf-8")
    return str(path)


def start_command(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def wait_for_step(config: RunConfig, step: int, process: subprocess.Popen[str] | None = None) -> None:
    """Return as soon as the metrics of the run, or of the process that runs it, tell of `step`."""
    run_files.wait_for_step(Path(config.output_dir), step, lambda: process is None or process.poll() is None)


def last_step(config: RunConfig) -> int:
    return run_files.last_step(Path(config.output_dir))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}

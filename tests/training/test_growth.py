"""A staged run grows at its boundaries, goes on in the data, and goes on bit for bit when it is killed around them."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from long_suite import cases
from run_files import assert_close_losses, assert_same_checkpoint, close, equal, last_step, losses
from small_run import small_config
from worlds import WorldError, Worlds

from megatron_step.checkpoint.directory import list_checkpoints
from megatron_step.checkpoint.manifest import read_manifest
from megatron_step.config.data import DataConfig
from megatron_step.config.run import RunConfig
from megatron_step.training import entry, stage
from megatron_step.training.run import run

TP2_PP2 = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
# Growth after steps 6 and 12; the checkpoint before them is that of step 5, or 10.
STAGES: dict[str, Any] = {"count": 3, "layers": [3, 2, 1], "steps": 8, "grow_at": 0.75}
UNEVEN = {**STAGES, "layouts": [[2, 1], [1, 4], [3, 3]]}
LAST = 20

# World size, and what differs from the default config.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"adapter": {"restart_interval": 4, "dropout": 0.1}}),
    "bf16 DP2 distributed": (2, {"training": {"precision": "bf16"}, "adapter": {"restart_interval": 4}}),
    "bf16 TP2 PP2 uneven, kept adapters": (
        4,
        {
            "parallel": TP2_PP2,
            "stages": UNEVEN,
            "training": {"precision": "bf16"},
            "adapter": {"at_stage_end": "keep"},
            "checkpoint": {"asynchronous": True},
        },
    ),
}

# Where a process is killed, and the step from which it goes on.
KILLS = {
    "before the last step of a stage": ("step", 5, 5),
    "in the middle of growth": ("moments", 6, 6),
    "right after growth": ("step", 6, 6),
    "one step after growth": ("step", 7, 6),
    "at the second growth": ("moments", 12, 12),
}


def _config(output: Path, data: DataConfig, **sections: Any) -> RunConfig:
    model = {"num_layers": 6, "num_query_groups": 2}
    return small_config(
        str(output), data=data, **{"model": model, "stages": STAGES, "evaluation": {"interval": 5}, **sections}
    )


@pytest.fixture(scope="module")
def straight(
    worlds: Worlds, small_data: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[int, RunConfig]]:
    """World size and config of a named run that was not killed."""

    @cache
    def run_straight(name: str) -> tuple[int, RunConfig]:
        size, sections = RUNS[name]
        config = _config(tmp_path_factory.mktemp("straight"), small_data, **sections)
        assert worlds(size).run(train, config=config) == [True] * size
        return size, config

    return run_straight


@pytest.mark.parametrize(
    ("name", "kill"),
    # A killed world starts slowly: those of several ranks are killed at one of the places.
    cases(
        product(RUNS, KILLS),
        [
            *product(["one process"], KILLS),
            ("bf16 DP2 distributed", "before the last step of a stage"),
            ("bf16 TP2 PP2 uneven, kept adapters", "in the middle of growth"),
        ],
    ),
)
def test_killed_around_growth_it_goes_on_bit_for_bit(
    worlds: Worlds, straight: Callable[[str], tuple[int, RunConfig]], tmp_path: Path, name: str, kill: str
) -> None:
    size, uncut = straight(name)
    where, step, goes_on_from = KILLS[kill]
    config = replace(uncut, output_dir=str(tmp_path))
    with pytest.raises(WorldError, match="died with exit status"):
        worlds(size).run(train_until_killed, config=config, where=where, step=step)
    assert last_step(tmp_path) == step
    if not config.checkpoint.asynchronous:  # else the checkpoint of step 5 may not have been finished
        assert list_checkpoints(tmp_path / "checkpoints")[-1][0] == goes_on_from
    assert worlds(size).run(train, config=config) == [True] * size
    expected = Path(uncut.output_dir)
    assert losses(tmp_path) == losses(expected)
    assert_same_checkpoint(tmp_path, expected, equal)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_staged_run_leaves(straight: Callable[[str], tuple[int, RunConfig]], name: str) -> None:
    output = Path(straight(name)[1].output_dir)
    lines = losses(output)
    assert [line[0] for line in lines] == list(range(1, LAST + 1))
    assert [line[1] for line in lines] == [0] * 6 + [1] * 6 + [2] * 8
    assert [line[5] for line in lines] == [8 * 32 * step for step in range(1, LAST + 1)], "tokens go on"
    rates = [line[4] / 2e-3 for line in lines]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]), "warm-up"
    assert rates[6:9] == pytest.approx([1 / 2, 1, 1]), "re-warm-up after growth"
    assert rates[-2:] == pytest.approx([1, 1 / 2]), "only the last stage's schedule comes to its decay"
    assert all(lines[step - 1][6] is not None for step in (5, 6, 10, 12, 15, 20)), "evaluated at each stage's end, too"
    manifest = read_manifest(list_checkpoints(output / "checkpoints")[-1][1])
    assert manifest.stage_index == 2
    assert (output / "plan.json").is_file()


@pytest.fixture(scope="module")
def at_tp2_pp2(worlds: Worlds, small_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Losses of a run that kept all its checkpoints."""
    config = _config(tmp_path_factory.mktemp("tp2_pp2"), small_data, parallel=TP2_PP2, checkpoint={"keep": 0})
    worlds(4).run(train, config=config)
    return config


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (4, {"tensor_parallel_size": 2})])
def test_grown_into_another_layout_it_goes_on_to_rounding(
    worlds: Worlds, at_tp2_pp2: RunConfig, tmp_path: Path, size: int, layout: dict[str, Any]
) -> None:
    """Resume from the checkpoint at a stage's boundary."""
    straight = Path(at_tp2_pp2.output_dir)
    boundary = straight / "checkpoints/step_00000012"
    shutil.copytree(boundary, tmp_path / "checkpoints" / boundary.name)
    config = replace(at_tp2_pp2, output_dir=str(tmp_path), parallel=small_config(parallel=layout).parallel)
    worlds(size).run(train, config=config)
    assert_close_losses(losses(tmp_path), losses(straight)[12:])
    assert_same_checkpoint(tmp_path, straight, close)


def test_every_sample_is_read_once_and_in_order(worlds: Worlds, small_data: DataConfig, tmp_path: Path) -> None:
    staged = _config(tmp_path / "staged", small_data)
    vanilla = _config(tmp_path / "vanilla", small_data, stages={"count": 1, "steps": LAST})
    (of_staged,), (of_vanilla,) = (worlds(1).run(first_tokens, config=config) for config in (staged, vanilla))
    assert len(of_staged) == LAST
    assert of_staged == of_vanilla


METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"stages": {"count": 1, "steps": 20}},
    "step in two stages": {"stages": {"count": 2, "steps": 12}},
    "step in six stages": {"stages": {"count": 6, "steps": 4, "layers": [1] * 6}},
    "relora": {"stages": {"count": 3, "steps": 8, "layers": [6, 0, 0]}, "adapter": {"restart_interval": 3}},
    "stack": {
        "stages": {"count": 2, "steps": 12, "layers": [2, 4]},
        "growth": {"operator": "stack", "init": "copy"},
        "freeze": {"layers": False},
    },
    "freeze-only": {"stages": STAGES, "adapter": {"rank": 0}},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_configurations_of_one_run(
    worlds: Worlds, small_data: DataConfig, tmp_path: Path, method: str
) -> None:
    config = _config(tmp_path, small_data, **METHODS[method])
    assert worlds(1).run(train, config=config) == [True]
    lines = losses(tmp_path)
    assert lines[-1][1] == config.stages.count - 1
    assert lines[-1][2] < lines[0][2] - 0.5, "it learns"


# What the ranks run.


def train(config: RunConfig) -> bool:
    return run(config)


def train_until_killed(config: RunConfig, where: str, step: int) -> None:
    """Train until this process is killed, once `step` steps are done: before the next one, or at a point of growth."""

    def die_at(function: Callable[..., Any], reached: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if reached(*arguments) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    place, name, reached = {
        "step": (stage, "train_step", lambda state, *rest: state.step),
        "grow": (entry, "read_manifest", lambda path: int(path.name.removeprefix("step_"))),
        "moments": (entry, "grow_moments", lambda path, *rest: int(path.name.removeprefix("step_"))),
    }[where]
    with patch.object(place, name, die_at(getattr(place, name), reached)):
        run(config)


def first_tokens(config: RunConfig) -> list[list[int]]:
    """The tokens of the first sample of every step's micro-batches."""
    seen: list[list[int]] = []
    train_step = stage.train_step

    def note(state: Any, microbatches: Any, *rest: Any) -> Any:
        seen.append([int(token) for batch in microbatches for token in batch["tokens"].flatten()])
        return train_step(state, microbatches, *rest)

    with patch.object(stage, "train_step", note):
        run(config)
    return seen

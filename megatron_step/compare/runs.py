"""Trains the runs of a comparison as processes, a few at a time. An interrupted run goes on from its checkpoint."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_step.compare.arms import ArmRun
from megatron_step.config.load import config_from_text, config_text
from megatron_step.config.yaml_json import read_json
from megatron_step.engine.files import atomic_write
from megatron_step.plan.stages import plan_from_dict

_POLL_SECONDS = 0.2
_LAST_LINES = 5


class RunError(RuntimeError):
    """A run of a comparison ended before its end."""


def train_all(runs: Sequence[ArmRun], jobs: int, finished: Callable[[ArmRun], None]) -> None:
    """Train `runs`, `jobs` at a time, and call `finished` after each; with CUDA each job has its own GPU.

    Raises RunError if a run fails; runs that were started with it reach a checkpoint and stop.
    """
    waiting, free = list(runs), list(range(jobs))
    running: dict[subprocess.Popen[bytes], tuple[ArmRun, int]] = {}
    with _stopped_at_the_end(running):
        while waiting or running:
            while waiting and free:
                run = waiting.pop(0)
                if _is_finished(run):
                    finished(run)
                else:
                    slot = free.pop(0)
                    running[_start(run, slot)] = run, slot
            for process in [process for process in running if process.poll() is not None]:
                run, slot = running.pop(process)
                free.append(slot)
                if process.returncode:
                    raise RunError(f"{run.folder} failed:\n{_last_lines(_log(run))}")
                finished(run)
            time.sleep(_POLL_SECONDS)


@contextmanager
def _stopped_at_the_end(running: dict["subprocess.Popen[bytes]", tuple[ArmRun, int]]) -> Iterator[None]:
    """Ask processes that are left to save and stop, also after an error or Control-C, and wait for them."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _start(run: ArmRun, slot: int) -> "subprocess.Popen[bytes]":
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "comparison.yaml"
    atomic_write(path, config_text(run.config))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(slot)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with _log(run).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_step", "train", "--config", str(path)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Control-C reaches the comparison alone, which asks the runs to stop
        )


def _is_finished(run: ArmRun) -> bool:
    """Return whether a run with the same config has trained its last step, and saved it."""
    try:
        config = config_from_text((run.folder / "config.yaml").read_text(encoding="utf-8"))
        last_step = plan_from_dict(read_json(run.folder / "plan.json")).num_steps
    except (OSError, ValueError):
        return False  # it has not begun
    return config == run.config and (run.folder / "checkpoints" / f"step_{last_step:08d}").is_dir()


def _log(run: ArmRun) -> Path:
    return run.folder / "output.log"


def _last_lines(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])

"""Fixtures for the tests of the examples: a tiny model on a small corpus, and a function that runs a script."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

from megatron_step.config.data import DataConfig

_TINY = """
    --model.num_layers 2 --model.hidden_size 32 --model.ffn_hidden_size 64 --model.num_attention_heads 2
    --model.num_query_groups 2 --model.seq_length 32 --schedule.warmup_steps 2 --training.precision fp32
    --training.global_batch_size 4 --training.micro_batch_size 1 --evaluation.interval 0 --evaluation.steps 2
    --checkpoint.interval 0 --checkpoint.asynchronous false --logging.tensorboard false --data.split [90,10]
"""


@pytest.fixture(scope="session")
def tiny(small_data: DataConfig) -> list[str]:
    """Overrides that make any example's config a run of a tiny model on a small corpus."""
    return [
        *_TINY.split(),
        "--data.tokenizer",
        small_data.tokenizer,
        "--data.train",
        f"[[1.0, {small_data.train[0][1]}]]",
    ]


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment after `source .venv/bin/activate`, with one thread a process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return {**kept, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_copy(tmp_path: Path, environment: dict[str, str]) -> Callable[..., str]:
    """`run_copy("step", "--key value", NAME=value)` runs an example's run.sh in `tmp_path`, with the end of each text.

    It returns what the script printed; what it made stays, for another call.
    """

    def run(example: str, overrides: str, **more: str) -> str:
        if not (tmp_path / "tools").exists():
            for name in {example, "paper", "scale"}:  # step plans the models of the last two
                shutil.copytree(REPOSITORY / "examples" / name, tmp_path / "examples" / name)
            shutil.copytree(REPOSITORY / "tools", tmp_path / "tools")
            (tmp_path / "examples/data").mkdir()
            for path in (REPOSITORY / "examples/data").iterdir():
                end = path.read_text(encoding="utf-8")[-400_000:]
                (tmp_path / "examples/data" / path.name).write_text(end, encoding="utf-8")
        finished = subprocess.run(
            [tmp_path / "examples" / example / "run.sh", *overrides.split()],
            cwd=tmp_path,
            env={**environment, **more},
            text=True,
            capture_output=True,
            timeout=600,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


@pytest.fixture
def run_script(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_script(command, NAME=value)` runs a command from the repository's root, with more in its environment."""

    def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**environment, **more},
            text=True,
            capture_output=True,
            timeout=300,
            check=False,
        )

    return run

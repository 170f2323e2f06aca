import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


def say_name(cuda: str) -> subprocess.CompletedProcess[str]:
    """setup.py asked for no more than the package's name, which makes it choose what to build."""
    environment = {**os.environ, "MSTEP_CUDA": cuda}
    command = [sys.executable, "setup.py", "-q", "--name"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_the_build_says_that_the_cuda_kernels_are_left_out():
    done = say_name("0")
    assert done.returncode == 0
    assert "building the CPU's operations, without the CUDA kernels (MSTEP_CUDA=0)" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_cuda_kernels_that_are_asked_for_but_cannot_be_built_are_an_error():
    done = say_name("1")
    assert done.returncode != 0
    assert "MSTEP_CUDA=1, but the CUDA kernels cannot be built: torch is built for the CPU" in done.stderr
    assert "Traceback" not in done.stderr

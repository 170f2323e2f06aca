"""A real model that is imported, grown, trained and exported has one loss, whoever computes it."""

import importlib.util
import re
import subprocess

import pytest
from small_corpus import REPOSITORY


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf: pip install -e '.[gguf]'")
def test_a_real_model_there_and_back(environment: dict[str, str]) -> None:
    finished = subprocess.run(
        [REPOSITORY / "examples/real_model/run.sh"], env=environment, text=True, capture_output=True, timeout=1800
    )
    if finished.returncode == 3:
        pytest.skip(finished.stdout.splitlines()[-1])
    assert finished.returncode == 0, finished.stderr
    assert "all tensors equal the trained ones" in finished.stdout
    assert "top-1 agreement 100.00 %" in finished.stdout
    losses = [float(loss) for loss in re.findall(r": loss (\d+\.\d+)", finished.stdout)]
    assert len(losses) == 3
    assert max(losses) - min(losses) <= 1e-6 * max(losses) + 1e-6  # of six digits after the point

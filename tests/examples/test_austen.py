"""The demo's script goes from text to a sample of the model's own, and shows the results when it is started again."""

import shutil
import subprocess
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

_TINY = "--stages.steps 4 --model.num_layers 1 --model.hidden_size 32 --model.ffn_hidden_size 64 --evaluation.steps 2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what the script needs, with the last tenth of the text."""
    shutil.copytree(REPOSITORY / "examples/austen", tmp_path / "examples/austen")
    shutil.copytree(REPOSITORY / "tools", tmp_path / "tools")
    text = (REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")
    (tmp_path / "examples/data").mkdir()
    (tmp_path / "examples/data/austen.txt").write_text(text[-len(text) // 10 :], encoding="utf-8")
    return tmp_path


def test_from_text_to_a_sample_and_again(folder: Path, environment: dict[str, str]) -> None:
    shown = []
    for _ in range(2):
        finished = subprocess.run(
            [folder / "examples/austen/run.sh", *_TINY.split()],
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
            timeout=600,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        shown.append(finished.stdout)
    for text in shown:
        assert "validation loss" in text
        assert "It was a fine morning, and Emma" in text
        assert (folder / "runs/austen/report.png").stat().st_size > 10_000
    assert "step 4/4" in shown[0]
    assert "step_00000004 is the end of the run" in shown[1]
    assert shown[0].splitlines()[-1] == shown[1].splitlines()[-1], "the same checkpoint writes the same text"

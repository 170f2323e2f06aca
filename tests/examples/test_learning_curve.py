"""The comparison trains both methods with three learning rates, and prints and draws all of them."""

import shutil
import subprocess
from pathlib import Path

from small_corpus import REPOSITORY

_TINY = """
    --model.num_layers 3 --model.hidden_size 16 --model.ffn_hidden_size 32 --adapter.rank 2
    --training.global_batch_size 2 --training.micro_batch_size 2 --evaluation.interval 0 --evaluation.steps 1
"""


def test_six_runs_side_by_side(tmp_path: Path, environment: dict[str, str]) -> None:
    shutil.copytree(REPOSITORY / "examples/learning_curve", tmp_path / "examples/learning_curve")
    shutil.copytree(REPOSITORY / "tools", tmp_path / "tools")
    (tmp_path / "examples/data").mkdir()
    for name in ("austen.txt", "sotu.txt"):
        text = (REPOSITORY / "examples/data" / name).read_text(encoding="utf-8")
        (tmp_path / "examples/data" / name).write_text(text[-400_000:], encoding="utf-8")
    finished = subprocess.run(
        [tmp_path / "examples/learning_curve/run.sh", *_TINY.split()],
        cwd=tmp_path,
        env={**environment, "STEPS": "4"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    table = finished.stdout[finished.stdout.index("3. All") :]
    for method in ("step", "vanilla"):
        for rate in ("1.5e-3", "3.0e-3", "6.0e-3"):
            assert f"{method}_{rate} " in table
    assert (tmp_path / "runs/learning_curve/report.png").stat().st_size > 10_000

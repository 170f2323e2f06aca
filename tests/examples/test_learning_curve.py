"""The comparison trains in three ways with each learning rate, and prints and draws all of them."""

from collections.abc import Callable
from pathlib import Path

_TINY = """
    --model.num_layers 3 --stages.layers [1,1,1] --model.hidden_size 16 --model.ffn_hidden_size 32 --adapter.rank 2
    --training.global_batch_size 2 --training.micro_batch_size 2 --evaluation.interval 0 --evaluation.steps 1
"""


def test_six_runs_side_by_side(tmp_path: Path, run_copy: Callable[..., str]) -> None:
    text = run_copy("learning_curve", _TINY, STEPS="5", RATES="1.5e-3 3.0e-3")
    table = text[text.index("3. All") :]
    for way in ("parity", "paper", "vanilla"):
        for rate in ("1.5e-3", "3.0e-3"):
            assert f"{way}_{rate} " in table
    assert (tmp_path / "runs/learning_curve/report.png").stat().st_size > 10_000

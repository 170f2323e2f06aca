"""The comparison trains each way, and prints and draws all of them."""

from collections.abc import Callable
from pathlib import Path

_TINY = """
    --arms vanilla parity lean paper --rates 3e-3 --stages.layers [1,1,1] --stages.steps 5 --model.num_layers 3
    --model.hidden_size 16 --model.ffn_hidden_size 32 --adapter.rank 2 --schedule.warmup_steps 1
    --training.global_batch_size 2 --training.micro_batch_size 2 --evaluation.interval 0 --evaluation.steps 1
    --old_layers.turn_steps 1
"""


def test_the_ways_side_by_side(tmp_path: Path, run_copy: Callable[..., str]) -> None:
    text = run_copy("learning_curve", _TINY)
    for way in ("vanilla", "parity", "lean", "paper"):
        assert f"{way}, rate 0.003, seed 1: perplexity " in text
        assert f"\n{way} " in text
    assert (tmp_path / "runs/learning_curve/comparison.png").stat().st_size > 10_000

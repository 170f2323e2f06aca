"""The script goes from text to a sample of the model's own."""

from collections.abc import Callable
from pathlib import Path

_TINY = "--stages.steps 4 --model.num_layers 1 --model.hidden_size 32 --model.ffn_hidden_size 64 --evaluation.steps 2"


def test_from_text_to_a_sample(tmp_path: Path, run_copy: Callable[..., str]) -> None:
    text = run_copy("austen", _TINY)
    assert "validation loss" in text
    assert "It was a fine morning, and Emma" in text
    assert (tmp_path / "runs/austen/report.png").stat().st_size > 10_000
    assert "step 4/4" in text

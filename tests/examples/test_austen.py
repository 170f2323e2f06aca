"""The script goes from text to a sample of the model's own, and shows the results when it is started again."""

from collections.abc import Callable
from pathlib import Path

_TINY = "--stages.steps 4 --model.num_layers 1 --model.hidden_size 32 --model.ffn_hidden_size 64 --evaluation.steps 2"


def test_from_text_to_a_sample_and_again(tmp_path: Path, run_copy: Callable[..., str]) -> None:
    shown = [run_copy("austen", _TINY) for _ in range(2)]
    for text in shown:
        assert "validation loss" in text
        assert "It was a fine morning, and Emma" in text
        assert (tmp_path / "runs/austen/report.png").stat().st_size > 10_000
    assert "step 4/4" in shown[0]
    assert "step_00000004 is the end of the run" in shown[1]
    assert shown[0].splitlines()[-1] == shown[1].splitlines()[-1], "the same checkpoint writes the same text"

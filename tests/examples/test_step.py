"""The demo trains a model in three ways and shows them side by side; started again, it shows them again."""

import re
from collections.abc import Callable
from pathlib import Path

_TINY = """
    --stages.steps 10 --stages.layers [1,1,1] --model.num_layers 3 --model.hidden_size 32 --model.ffn_hidden_size 64
    --evaluation.steps 2
"""


def test_three_runs_side_by_side_and_again(tmp_path: Path, run_copy: Callable[..., str]) -> None:
    shown = [run_copy("step", _TINY) for _ in range(2)]
    assert "stage 3 of 3: 3 layers, 1 of them new" in shown[0]
    assert "grown by interpolate, upper, mean, which does not keep the model's function" in shown[0]
    assert shown[0].count("step 10/10") == 2, "3 + 3 + 4 steps, and as many of the published way"
    assert "step 10/10" in (tmp_path / "runs/step_vanilla.log").read_text(), "and of the ordinary run"
    assert "preset parity: stages.count 3" in shown[0]
    for text in shown:
        rows = [line.split() for line in text.splitlines() if line.startswith("step")]
        stages = [(row[0], row[1]) for row in rows if row[1] in "123" and len(row) >= 8 and row[-1] == "s"]
        expected = [("step", "1"), ("step", "2"), ("step", "3")]
        assert stages == [*expected, *(("step_paper", stage) for _, stage in expected), ("step_vanilla", "1")]
        assert re.search(r"step, compared with step_vanilla: perplexity .*, \d+% of its peak memory, \d+% of its", text)
        assert "7B on 8 GPUs, TP4 PP2   preset parity" in text
        assert "It was a fine morning, and Emma" in text
        assert (tmp_path / "runs/step/report.png").stat().st_size > 10_000
        assert "top-1 agreement 100.00 %" in text
        measured = re.search(r"runs/step/hf: loss (\d\.\d+), perplexity .* bits per byte\non \d+ documents?, ", text)
        assert measured
        assert 4 < float(measured[1]) < 8, "of 2,048 tokens, after ten steps"
        assert (tmp_path / "runs/step/hf/model.safetensors").is_file()
    written = [text[text.index("It was a fine morning, and Emma") :] for text in shown]
    assert written[0] == written[1], "the same checkpoint writes the same text"

"""Shown lines say what matters, in the form that the output has room for."""

import io
import sys

import pytest
from small_run import small_config

from megatron_step.training.trackers.progress import ProgressBar, ProgressLines, progress, progress_line
from megatron_step.training.trackers.tracker import TrackedRun

RUN = TrackedRun(small_config(), num_steps=10, first_step=0)
METRICS = {
    "step": 5,
    "loss": 0.2,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 1e6,
    "tflops_per_second": 0.25,
}


def test_a_line_names_each_number() -> None:
    memory = {"peak_bytes": 8 << 20}
    evaluated = {"validation_loss": 2.0, "validation_perplexity": 7.389}
    assert progress_line({**METRICS, "mfu": 0.5, "memory": memory, **evaluated}, 10) == (
        "step 5/10 | loss 0.2000 | learning rate 1.00e-03 | gradient norm 0.500 | 1,000,000 tokens/s | 0.25 TFLOP/s | "
        "MFU 50.0% | peak memory 8 MiB | validation loss 2.0000 | perplexity 7.39"
    )


def test_lines_are_printed_for_shown_steps_alone(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress(RUN)
    assert isinstance(shown, ProgressLines)
    for step in range(1, 6):
        shown.write({**METRICS, "step": step}, step == 5)
    shown.close()
    assert capsys.readouterr().out == progress_line(METRICS, 10) + "\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = progress(RUN)
    assert isinstance(shown, ProgressBar)
    shown.write(METRICS, False)
    shown.close()
    assert "5/10" in terminal.getvalue()

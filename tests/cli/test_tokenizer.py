"""`megatron-step tokenizer` writes a tokenizer, and refuses bad input with one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import REPOSITORY

from megatron_step.data.tokenizer import load_tokenizer


def test_a_tokenizer_is_written(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")[:50_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model = tmp_path / "some.model"
    assert command("tokenizer", "--input", tmp_path / "text.txt", "--vocab-size", 400, "--output", model) == 0
    assert load_tokenizer(str(model)).vocab_size == 400
    assert "400 tokens" in capsys.readouterr().out


def test_bad_input(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "some.model"
    assert command("tokenizer", "--input", tmp_path / "nowhere.txt", "--vocab-size", 400, "--output", model) == 2
    shown = capsys.readouterr().err
    assert "nowhere.txt" in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

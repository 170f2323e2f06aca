"""`megatron-step preprocess` writes a corpus, and refuses bad input with one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_step.config.data import DataConfig
from megatron_step.data.check import check_corpus
from megatron_step.data.tokenizer import load_tokenizer


def test_a_corpus_is_written(
    command: Callable, tmp_path: Path, small_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("one document\n\nanother\n\na third")
    where = ["--tokenizer", small_data.tokenizer, "--output", tmp_path / "corpus", "--document-separator", r"\n\n"]
    assert command("preprocess", "--input", tmp_path / "text.txt", "--workers", 1, *where) == 0
    assert check_corpus(str(tmp_path / "corpus"), load_tokenizer(small_data.tokenizer)).documents == 3
    assert "3 documents" in capsys.readouterr().out


def test_bad_input(
    command: Callable, tmp_path: Path, small_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("")
    where = ["--tokenizer", small_data.tokenizer, "--output", tmp_path / "corpus", "--workers", 1]
    assert command("preprocess", "--input", tmp_path / "text.txt", *where) == 2
    assert "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]

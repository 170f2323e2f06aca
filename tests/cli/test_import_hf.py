"""`megatron-step import-hf` makes a checkpoint, says how to start from it, and refuses bad input with one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hf_checkpoints import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def test_a_model_is_imported(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9)).save_pretrained(tmp_path / "llama")
    word_tokenizer(tmp_path / "llama")
    assert command("import-hf", tmp_path / "llama", tmp_path / "out", "--seq-length", "64") == 0
    shown = capsys.readouterr().out
    assert "weights in float32, kept in fp32" in shown
    for line in ("model:\n  num_layers: 1", "  seq_length: 64", f"  start_from: {tmp_path / 'out'}"):
        assert line in shown


def test_bad_input(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("import-hf", tmp_path / "nowhere", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert "nowhere is not a Hugging Face model, because it has no config.json" in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

"""`megatron-step evaluate` prints the loss and the text of a checkpoint and of its export, and refuses the rest."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import REPOSITORY
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.data.preprocess import preprocess
from megatron_step.data.train_tokenizer import train_tokenizer
from megatron_step.huggingface.to_hf import ExportOptions, export_model
from megatron_step.training.run import run


def test_loss_and_text(
    command: Callable, tmp_path: Path, small_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, exported = tmp_path / "run", tmp_path / "model"
    assert run(small_config(str(trained), data=small_data, steps=1))
    export_model(trained, exported, ExportOptions())
    (tmp_path / "text.txt").write_text("Emma was\n\nhandsome and clever")
    preprocess([tmp_path / "text.txt"], tmp_path / "corpus", small_data.tokenizer)

    def shown(*arguments: object) -> str:
        capsys.readouterr()
        assert command("evaluate", *arguments) == 0
        return capsys.readouterr().out

    assert "step_00000001: validation loss 5." in shown(trained)
    flags = ("--text", tmp_path / "text.txt", "--document-separator", "\\n\\n", "--stride", "4", "--seq-length", "16")
    of_both = [shown(path, *flags) for path in (trained, exported)]
    figures = re.compile(
        r": loss (5\.\d+), perplexity (\d+\.\d+), (\d+\.\d+) bits per byte\non 2 documents, \d+ tokens, "
    )
    found = [figures.search(text) for text in of_both]
    assert found[0]
    assert found[1]
    assert [float(value) for value in found[0].groups()] == pytest.approx(
        [float(x) for x in found[1].groups()], rel=1e-5
    )
    assert of_both[0].endswith(" 27 bytes, in windows of 16 tokens, 4 apart\n")
    of_corpus = [shown(path, "--data", tmp_path / "corpus").partition(" tokens, ")[0] for path in (trained, exported)]
    assert of_corpus[0].partition(": loss ")[2] == of_corpus[1].partition(": loss ")[2] != ""
    greedy = [shown(path, "--generate", "Emma", "--tokens", "3", "--temperature", "0") for path in (trained, exported)]
    assert greedy[0].startswith("Emma")
    assert greedy[0] == greedy[1]

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert command("evaluate", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    assert "has no validation set: give --text or --data" in refused(exported)
    assert "--stride is 33: it must be between 1 and the window's 32 tokens" in refused(
        trained, "--text", tmp_path / "text.txt", "--stride", "33"
    )
    assert "validation loss" in shown(trained, "--tokenizer", exported)  # other files, the same ids
    other = tmp_path / "other.model"
    text = (REPOSITORY / "examples/data/sotu.txt").read_text(encoding="utf-8")[:50_000]
    (tmp_path / "other.txt").write_text(text, encoding="utf-8")
    train_tokenizer([tmp_path / "other.txt"], other, vocab_size=400)
    assert "is not the tokenizer that the model was trained with" in refused(trained, "--tokenizer", other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist: give a checkpoint"),
        (["."], ". is not a model: give a checkpoint"),
        (["nowhere", "--tokens", "0"], "--tokens must be at least 1"),
        (["nowhere", "--stride", "4"], "--stride 4 needs a text"),
        (["nowhere", "--text", "nothing.txt"], "the input nothing.txt does not exist"),
        (["nowhere", "--text", "empty.txt"], "empty.txt is empty"),
    ],
)
def test_bad_input(
    command: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert command("evaluate", *arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1

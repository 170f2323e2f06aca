"""Commands that share an option share its text and its default; a required option is asked for."""

import argparse
from pathlib import Path

import pytest

from megatron_step.cli.options import add_documents, add_input, add_records, add_tokenizer


def test_shared_options_have_the_same_meaning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = argparse.ArgumentParser()
    add_input(parser)
    add_records(parser)
    add_documents(parser, "its own")
    add_tokenizer(parser, "the run's")
    arguments = parser.parse_args(["--input", "~/a.txt", "b", "--document-separator", "\\n\\t"])
    assert arguments.input == [f"{tmp_path}/a.txt", "b"]
    assert (arguments.key, arguments.skip_invalid, arguments.tokenizer) == ("text", False, None)
    assert (arguments.document_separator, arguments.end_of_document) == ("\n\t", None)
    assert "(default: its own)" in " ".join(parser.format_help().split())
    assert "(default: the run's)" in " ".join(parser.format_help().split())


def test_a_tokenizer_without_a_default_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_tokenizer(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "required: --tokenizer" in capsys.readouterr().err

"""A text has the tokens that preprocessing gives it, and its bytes are counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_step.config.data import DataConfig
from megatron_step.data.preprocess import preprocess
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.evaluation.text import text_of_corpus, text_of_files


def test_files_and_the_corpus_made_of_them_are_one_text(
    tmp_path: Path, small_data: DataConfig, text_file: Path, paragraphs: list[str]
) -> None:
    tokenizer = load_tokenizer(small_data.tokenizer)
    of_files = text_of_files([text_file], tokenizer)
    preprocess([text_file], tmp_path / "corpus", small_data.tokenizer)
    of_corpus = text_of_corpus(str(tmp_path / "corpus"), tokenizer)
    assert np.array_equal(of_files.tokens, of_corpus.tokens)
    expected = [token for text in paragraphs for token in (*tokenizer.encode(text), tokenizer.eod_id)]
    assert of_files.tokens.tolist() == [tokenizer.eod_id, *expected]
    num_bytes = sum(len(text.encode()) for text in paragraphs)
    assert (of_files.num_documents, of_files.num_bytes) == (len(paragraphs), num_bytes)
    decoded = sum(len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in paragraphs)
    assert (of_corpus.num_documents, of_corpus.num_bytes) == (len(paragraphs), decoded)
    assert decoded == pytest.approx(num_bytes, rel=0.02)


def test_a_corpus_of_the_tokenizer_that_an_export_was_made_from(
    tmp_path: Path, small_data: DataConfig, exported: Path, text_file: Path
) -> None:
    made_by = load_tokenizer(small_data.tokenizer)
    texts = []
    for name, path in (("own", exported), ("original", small_data.tokenizer)):
        preprocess([text_file], tmp_path / name, str(path))
        texts.append(text_of_corpus(str(tmp_path / name), load_tokenizer(exported)))
    assert np.array_equal(texts[0].tokens, texts[1].tokens)
    assert texts[1].num_bytes == text_of_corpus(str(tmp_path / "original"), made_by).num_bytes
    with pytest.raises(ValueError, match="was tokenized with"):
        text_of_corpus(str(tmp_path / "own"), made_by)


def test_separators_keys_and_what_is_left_out(tmp_path: Path, small_data: DataConfig) -> None:
    tokenizer = load_tokenizer(small_data.tokenizer)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert text_of_files([tmp_path / "a.txt"], tokenizer).num_documents == 1
    text = text_of_files([tmp_path / "a.txt"], tokenizer, separator="\n\n")
    assert (text.num_documents, text.num_bytes) == (2, 6)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "é"}) + "\n" + json.dumps({"body": ""}) + "\n")
    text = text_of_files([tmp_path / "b.jsonl"], tokenizer, key="body", skip_invalid=True)
    assert (text.num_documents, text.num_bytes, text.skipped) == (1, 2, {"empty text": 1})


def test_no_text(tmp_path: Path, small_data: DataConfig) -> None:
    tokenizer = load_tokenizer(small_data.tokenizer)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="the file has no text"):
        text_of_files([tmp_path / "a.txt"], tokenizer)
    with pytest.raises(ValueError, match="the input holds no document"):
        text_of_files([tmp_path / "a.txt"], tokenizer, skip_invalid=True)

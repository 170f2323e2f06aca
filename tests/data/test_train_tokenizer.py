import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.data.pieces import Piece
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer
from megatron_step.data.train_tokenizer import sample_sentences, split_sentences, train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=200))
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_white_space_survives_both_algorithms(tmp_path: Path, text: str, model_type: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", 400, model_type=model_type)
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert tokenizer.vocab_size == 400
    for sample in (
        "  two\t\ttabs  ",
        "\n\n\n",
        " ",
        "a\r\nb\r\n",
        "x\n  indented\n",
        "NUL \0",
        "é ✓ 😀 ﬁ ①\u00a0\u3000",
        text,
    ):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


@pytest.mark.parametrize(
    "sign", ["\0", "\u2585", "\u2581", "\u2047", "\ufffd", "\t", "\x85", "\ufeff", "</s>", "😀" * 1024]
)
def test_lines_with_a_sign_that_sentencepiece_reserves_are_trained_on(tmp_path: Path, text: str, sign: str) -> None:
    lines = text[:20_000].split("\n")
    lines = [f"{sign} zyxwvut zyxwvut {line}" if index % 2 else line for index, line in enumerate(lines)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", 400)
    assert len(load_tokenizer(tmp_path / "a.model").encode(" zyxwvut")) == 1


def test_training_is_repeatable(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for name in ("a", "b"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / f"{name}.model", 400, sample_bytes=20_000, seed=3)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_same_model_from_every_kind_of_file(tmp_path: Path, text: str) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "a.parquet")
    for kind in ("txt", "jsonl", "parquet"):
        train_tokenizer([tmp_path / f"a.{kind}"], tmp_path / f"{kind}.model", 400)
    assert len({(tmp_path / f"{kind}.model").read_bytes() for kind in ("txt", "jsonl", "parquet")}) == 1


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_that_the_text_cannot_fill(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "a.txt").write_text("hello world\n" * 10)
    with pytest.raises(
        ValueError, match=r"--vocab-size 8000 is too large for this text: set it to at most \d+"
    ) as raised:
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", 8000, model_type=model_type)
    most = int(str(raised.value).split("at most ")[1].split(",")[0])
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "b.model", most, model_type=model_type)
    assert load_tokenizer(tmp_path / "b.model").vocab_size == most
    assert not (tmp_path / "a.model").exists()


@pytest.mark.parametrize("vocab_size", [-1, 0, 1, 100, 261])
def test_vocabulary_too_small(tmp_path: Path, vocab_size: int) -> None:
    (tmp_path / "a.txt").write_text("hello world\n" * 10)
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", vocab_size)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_bad_text_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\n" * 100)
    with pytest.raises(ValueError, match=r"a\.txt, byte 9: invalid UTF-8"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.model", 300)


def test_sentences_keep_all_characters_but_line_feeds() -> None:
    text = "one\n\n  two " + "x" * 3000 + " three" * 400 + "\nlast"
    sentences = list(split_sentences([Piece(text, True)]))
    assert "".join(sentences) == text.replace("\n", "")
    assert max(map(len, sentences)) <= 1024
    assert sentences[:1] == ["one"] and sentences[-1] == "last"


def test_sample_is_bounded_even_and_repeatable() -> None:
    sentences = [f"{index:07d}" for index in range(20_000)]
    sample = sample_sentences(iter(sentences), 7 * 4000, seed=1)
    assert 2000 * 0.8 < len(sample) <= 4000
    assert sample == sorted(set(sample))
    in_first_half = sum(int(one) < 10_000 for one in sample) / len(sample)
    assert 0.45 < in_first_half < 0.55
    assert sample == sample_sentences(iter(sentences), 7 * 4000, seed=1)
    assert sample != sample_sentences(iter(sentences), 7 * 4000, seed=2)
    assert sample_sentences(iter(sentences), 7 * 20_000, seed=1) == sentences


def test_tool(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, cwd=tmp_path)

    made = run("--input", "a.txt", "--vocab-size", "400", "--output", "models/a.model")
    assert made.returncode == 0, made.stderr
    assert load_tokenizer(tmp_path / "models" / "a.model").vocab_size == 400
    for bad in (["--input", "b.txt"], ["--input", "a.txt", "--output", "a.bin"]):
        failed = run("--vocab-size", "400", "--output", "b.model", *bad)
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1 and "error: " in failed.stderr

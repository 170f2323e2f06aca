"""A SentencePiece model and its fast tokenizer give the same ids, and the text back."""

import io
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from small_corpus import REPOSITORY

from megatron_step.data.tokenizer import SentencePieceTokenizer
from megatron_step.data.train_tokenizer import train_tokenizer
from megatron_step.export import fast_tokenizer as module
from megatron_step.export.fast_tokenizer import fast_tokenizer

TEXT = (REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")[:250_000]
STRANGE = [" two  spaces\n\n\n", "\t\r\n", "Ünï¢ödé 漢字 🎉👩‍👧", "\x00\x01", "▁", "1234567", "", " "]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_of_a_tokenizer_trained_here(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:150_000])
    train_tokenizer([tmp_path / "text.txt"], tmp_path / "its.model", 800, model_type=kind)
    slow = SentencePieceTokenizer(tmp_path / "its.model")
    fast = fast_tokenizer(slow)
    for text in [*STRANGE, *(TEXT[start : start + 2000] for start in range(150_000, 250_000, 2000))]:
        assert fast.encode(text).ids == slow.encode(text)
        assert fast.decode(slow.encode(text)) == slow.decode(slow.encode(text))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_of_a_tokenizer_in_sentencepieces_own_ways(tmp_path: Path, kind: str) -> None:
    """With its normal form of characters, a space in front, and others taken away: those of Llama 2 and T5."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[:100_000].splitlines()), model_writer=model, vocab_size=700, model_type=kind,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "its.model").write_bytes(model.getvalue())
    slow = SentencePieceTokenizer(tmp_path / "its.model")
    fast = fast_tokenizer(slow)
    for text in TEXT[100_000:150_000].split("\n\n"):
        assert fast.encode(text).ids == slow.encode(text)


def test_other_ids_are_refused(tmp_path: Path, small_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = module._merges
    monkeypatch.setattr(module, "_merges", lambda model: merges(model)[::-1])
    with pytest.raises(ValueError, match="they differ on .*--tokenizer"):
        fast_tokenizer(SentencePieceTokenizer(small_data.tokenizer))
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["some words"] * 9), model_writer=model, vocab_size=5, model_type="word",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "words.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="neither a BPE nor a unigram model"):
        fast_tokenizer(SentencePieceTokenizer(tmp_path / "words.model"))

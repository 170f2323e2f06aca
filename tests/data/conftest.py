"""Text and tokenizers that the data tests share."""

import random
from pathlib import Path

import pytest

from megatron_step.data.tokenizer import Tokenizer, load_tokenizer
from megatron_step.data.train_tokenizer import train_tokenizer


def make_text(num_paragraphs: int, seed: int = 1) -> str:
    """Paragraphs of made-up words, some of them far from ASCII."""
    chance = random.Random(seed)
    syllables = ["ka", "lo", "min", "tra", "é", "sch", "ou", "ß", "na", "ri", "дом", "木", "qu", "est"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(300)]
    paragraphs = [" ".join(chance.choices(words, k=chance.randint(3, 60))) + "." for _ in range(num_paragraphs)]
    return "\n\n".join(paragraphs) + "\n"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece model of 500 tokens."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(make_text(200), encoding="utf-8")
    train_tokenizer([folder / "text.txt"], folder / "tokenizer.model", 500)
    return str(folder / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: str) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def text() -> str:
    """About 40 KB of text in 200 paragraphs."""
    return make_text(200, seed=2)

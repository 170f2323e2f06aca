"""A small tokenized corpus, made from the shipped text by our own tools."""

from pathlib import Path

from megatron_step.config.data import DataConfig
from megatron_step.data.preprocess import preprocess
from megatron_step.data.train_tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[1]
_CHARACTERS = 150_000


def small_corpus(folder: Path) -> DataConfig:
    """The beginning of the Austen text in `folder`: a document for each paragraph, a tenth of them for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")[:_CHARACTERS]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer, prefix = str(folder / "tokenizer.model"), str(folder / "corpus")
    train_tokenizer([folder / "text.txt"], tokenizer, vocab_size=400)
    preprocess([folder / "text.txt"], prefix, tokenizer, separator="\n\n")
    return DataConfig(train=[(1.0, prefix)], tokenizer=tokenizer, split=(90, 10))

"""Train a SentencePiece tokenizer whose decoding restores the encoded text exactly."""

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_step.data.documents import DocumentReader
from megatron_step.data.pieces import Piece
from megatron_step.data.text_files import find_text_files
from megatron_step.engine.files import atomic_write
from megatron_step.engine.output_lock import lock_beside, output_lock

_LONGEST_SENTENCE_CHARACTERS = 1024
_SENTENCE = re.compile(
    rf"[^\n]{{1,{_LONGEST_SENTENCE_CHARACTERS}}}(?![^ \n])|[^\n]{{1,{_LONGEST_SENTENCE_CHARACTERS}}}"
)
_NEWLINES = ["\n", "\n\n"]
_LEFT_OUT = str.maketrans({"\0": "\n", "\u2585": "\n"})
"""Characters that end a line here, since SentencePiece silently drops lines that contain them from training."""
_FIXED_TOKENS = 3 + 256 + len(_NEWLINES)
"""Number of fixed tokens: <unk>, <s>, </s>, one for each byte, and the line feeds."""


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    key: str = "text",
    skip_invalid: bool = False,
    sample_bytes: int = 256 << 20,
    seed: int = 1,
) -> None:
    """Train a tokenizer on files and folders of text, and write the model to `output`, a path that ends in .model.

    Decoding restores the text: it is neither normalized nor trimmed, unknown characters become bytes, each digit is a
    token, and line feeds have separate tokens. The one exception is U+2581, SentencePiece's sign for a space, which is
    decoded as a space. NUL and U+2585 always become bytes. Tokens 0 to 2 are <unk>, <s>, </s>. If the text is longer
    than `sample_bytes`, an even sample of it is drawn with `seed`.

    Raises FileNotFoundError for missing input, and InUseError if another process writes `output`. Raises ValueError for
    bad input, also if the text has too few or too many characters for `vocab_size` tokens. After an error `output` is
    unchanged.
    """
    from sentencepiece import SentencePieceTrainer

    output = Path(output)
    if output.suffix != ".model":
        raise ValueError(f"the output {output} does not end in .model: choose a name that does")
    if vocab_size <= _FIXED_TOKENS:
        raise ValueError(f"--vocab-size {vocab_size} is too small: it must be over {_FIXED_TOKENS}")
    with output_lock(lock_beside(output), output):
        reader = DocumentReader(find_text_files(inputs).files, key, None, skip_invalid)
        sentences = sample_sentences(split_sentences(reader), sample_bytes, seed)
        if not sentences:
            raise ValueError("the input holds no text to train a tokenizer on: give files with text")
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                byte_fallback=True,
                character_coverage=0.9999,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                user_defined_symbols=_NEWLINES,
                max_sentence_length=8 * _LONGEST_SENTENCE_CHARACTERS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(_explain(str(error), vocab_size)) from error
        atomic_write(output, model.getvalue())


def split_sentences(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yield the lines of the text without line feeds; long lines are cut, before a space if there is one.

    NUL and U+2585 also end a line, because SentencePiece would drop every line that contains one of them.
    """
    for piece in pieces:
        for match in _SENTENCE.finditer(piece.text.translate(_LEFT_OUT)):
            yield match[0]


def sample_sentences(sentences: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """Return all sentences if they fit into `limit_bytes` of UTF-8, else an even sample of at least about half that.

    Each sentence is kept with probability p, which starts at 1. Whenever the kept sentences exceed the limit, each is
    dropped with probability 1/2, and p is halved. The sample depends on the text, the limit and the seed only.
    """
    chance = random.Random(seed)
    kept: list[str] = []
    kept_bytes, keep = 0, 1.0
    for sentence in sentences:
        if keep < 1.0 and chance.random() >= keep:
            continue
        kept.append(sentence)
        kept_bytes += len(sentence.encode())
        while kept_bytes > limit_bytes and len(kept) > 1:
            kept = [one for one in kept if chance.random() < 0.5] or kept[:1]
            kept_bytes = sum(len(one.encode()) for one in kept)
            keep /= 2
    return kept


def _explain(message: str, vocab_size: int) -> str:
    """Return SentencePiece's error in terms of the command's options."""
    if too_high := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too large for this text: set it to at most {too_high[1]}, or give more text"
        )
    if too_low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small for this text: it must be over {too_low[1]}"
    return f"SentencePiece cannot train on this text: {message}"

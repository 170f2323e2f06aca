"""Train a SentencePiece tokenizer whose decoding gives back exactly the text that was encoded."""

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
"""Characters whose lines SentencePiece leaves out of training without a word: here they end a line instead."""
_FIXED_TOKENS = 3 + 256 + len(_NEWLINES)
"""<unk>, <s>, </s>, one for each byte, line feeds."""


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
    """Train on files and folders of text and write the model to `output`, a path that ends in .model.

    Text is neither normalized nor trimmed, unknown characters become bytes, digits stand alone, and line feeds have
    separate tokens: so decoding gives back the text (only U+2581, SentencePiece's own sign for a space, comes back
    as a space; NUL and U+2585, which it reserves as well, always become bytes). Tokens 0 to 2 are <unk>, <s>, </s>.
    More text than `sample_bytes` is sampled, evenly and by `seed`.

    Raises FileNotFoundError and ValueError, also where the text cannot fill `vocab_size` tokens or these cannot hold
    its characters; nothing is written then. Raises InUseError if another process trains into `output`.
    """
    from sentencepiece import SentencePieceTrainer

    output = Path(output)
    if output.suffix != ".model":
        raise ValueError(f"the output {output} must end in .model")
    if vocab_size <= _FIXED_TOKENS:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens (--vocab-size) is too small: it needs over {_FIXED_TOKENS}"
        )
    with output_lock(lock_beside(output), output):
        reader = DocumentReader(find_text_files(inputs).files, key, None, skip_invalid)
        sentences = sample_sentences(split_sentences(reader), sample_bytes, seed)
        if not sentences:
            raise ValueError("the input holds no text to train a tokenizer on")
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
    """The lines of the text without their line feeds, long ones cut, before a space where there is one.

    NUL and U+2585 end a line, too: SentencePiece would leave out every line with one of them.
    """
    for piece in pieces:
        for match in _SENTENCE.finditer(piece.text.translate(_LEFT_OUT)):
            yield match[0]


def sample_sentences(sentences: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """All sentences if they fit into `limit_bytes` of UTF-8, else an even sample that fills about half of it or more.

    Keeps each with chance p, starting at 1; whenever the kept ones outgrow the limit, drops each with chance 1/2 and
    halves p. What is kept depends on the text, the limit and the seed alone.
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
    """SentencePiece's error in the words of the command."""
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return (
            f"the text cannot fill a vocabulary of {vocab_size} tokens: ask for at most {most[1]} (--vocab-size), "
            "or give more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} tokens (--vocab-size) is too small for this text: it needs over {least[1]}"
        )
    return f"SentencePiece cannot train on this text: {message}"

"""Texts that show whether two tokenizers differ: code, spaces, emoji, Unicode forms, and words of a vocabulary."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

Encode = Callable[[Sequence[str]], list[list[int]]]
"""A function from texts to their ids, without special tokens around them."""

_FIXED = [
    "",
    " ",
    "a",
    "The quick brown fox jumps over 1234567890 lazy dogs.",
    "  leading,   inner  and trailing spaces  ",
    "line\nline\n\nline\n\n\n\r\n\tindented",
    "\n",
    " \n ",
    "\n\n\n a\n b\t\t\tc  \n",
    "café naïve Ωμέγα Привет 你好 こんにちは 🎉👩‍👩‍👧 \u00a0\u200b\ufeff ﬁ Å Å",
    "cafe\u0301 ＦＵＬＬ ½ ① İSTANBUL straße ǅ שָׁלוֹם مرحبا 안녕 हिन्दी \u2028\u3000",
    "▁ ▁▁a",
    "aaaaaaaaaaaaa ababababab !!!???...---___",
    'def f(x, *, y=None):\n    if x != y:\n        return {"a": [1, 2.5e-3]}  # why\n\n\treturn f"{x:>8}"\n',
    "for (int i = 0; i < n; ++i) {\r\n\tsum += a[i]->b;\r\n}",
    "I've they'll DON'T we're 'quoted' \"double\" it's 100% of $5.00, e.g. at http://a.b/c?d=e&f=%20#g",
    "Iamaverylongwordthatnovocabularyholdsasonepiece" * 4,
    "<tag a=1>text</tag> {{x}} [a] <|b c|> $e^{i\\pi}$",
    "0 00 000 0000 00000 1.234.567,89",
    *("x" + " " * width + "y\n" + " " * width + "z" for width in (2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 31, 33, 64)),
]
_NUM_MIXED, _TOKENS_OF_A_TEXT, _NUM_WORDS = 200, 30, 2000
_MOST_IN_CONTEXT = 64


class Probed(Protocol):
    """The attributes of a tokenizer from which test texts are made."""

    vocab_size: int
    """The largest id plus 1."""
    marks: dict[str, int]
    """Ids of the texts that always become one token, such as special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...


def plain_texts(tokenizer: Probed) -> Iterator[str]:
    """Yield texts without marks, which reveal differences in merges, spaces and characters."""
    yield from _FIXED
    chance = random.Random(1)
    marks = set(tokenizer.marks.values())
    ids = [index for index in range(tokenizer.vocab_size) if index not in marks]
    words = [index for index in chance.sample(ids, min(_NUM_WORDS, len(ids))) if _is_text(tokenizer.decode([index]))]
    for _ in range(_NUM_MIXED if words else 0):
        yield tokenizer.decode(chance.choices(words, k=_TOKENS_OF_A_TEXT))


def _is_text(word: str) -> bool:
    return bool(word) and "\ufffd" not in word  # U+FFFD replaces bytes that are not a character


def marked_texts(marks: Sequence[str]) -> Iterator[str]:
    """Yield texts with marks between words, spaces and line feeds; some marks absorb neighbouring spaces."""
    for mark in marks[:_MOST_IN_CONTEXT]:
        yield f"{mark}Some{mark} text {mark} a{mark}b\n {mark} \n{mark}{mark}"
        yield f"word{mark.upper()}{mark.lower()} {mark}s {mark}."
    yield "a".join(marks)
    yield " ".join(marks)


def first_difference(ours: Encode, theirs: Encode, texts: Sequence[str]) -> str | None:
    """Return the first text for which two tokenizers give different ids, or None."""
    pairs = zip(texts, ours(texts), theirs(texts))
    return next((text for text, our_ids, their_ids in pairs if list(our_ids) != list(their_ids)), None)

"""Texts made to tell tokenizers apart do so for every rule that real tokenizers differ by."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from megatron_step.data.probes import first_difference, marked_texts, plain_texts


class Backend:
    """A BPE tokenizer over bytes, with one rule or another."""

    def __init__(self, rule: Callable[[tokenizers.Tokenizer], object] = lambda backend: None) -> None:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words = ["it was a fine morning in 1815", "  and so on\n\n\ttoday", "don't", "==  ==", "    x", "İ é ﬁ"] * 9
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            words, trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
        )
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_tokens([AddedToken("<mark>", special=True)])
        rule(backend)
        self.backend, self.marks = backend, {"<mark>": backend.token_to_id("<mark>")}
        self.vocab_size = backend.get_vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids))


def setting(name: str, value: Any) -> Callable[[tokenizers.Tokenizer], object]:
    return lambda backend: setattr(backend, name, value)


def with_pre_tokenizer(first: Any) -> Callable[[tokenizers.Tokenizer], object]:
    return setting("pre_tokenizer", pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


PLAIN_RULES = {
    "composed forms": setting("normalizer", normalizers.NFC()),
    "compatible forms": setting("normalizer", normalizers.NFKC()),
    "lower case": setting("normalizer", normalizers.Lowercase()),
    "spaces stripped": setting("normalizer", normalizers.Strip()),
    "runs of spaces reduced": setting("normalizer", normalizers.Replace(Regex(" {2,}"), " ")),
    "a space in front": setting("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no words": setting("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "single digits": with_pre_tokenizer(pre_tokenizers.Digits(individual_digits=True)),
    "line feeds apart": with_pre_tokenizer(pre_tokenizers.Split("\n", "isolated")),
    "merges left out": lambda backend: setattr(
        backend, "model", models.BPE(vocab=backend.get_vocab(with_added_tokens=False), merges=[])
    ),
}
MARK_RULES = {
    flag: lambda backend, flag=flag: backend.add_tokens([AddedToken("<mark>", special=True, **{flag: True})])
    for flag in ("lstrip", "rstrip", "single_word")
}


def test_equal_tokenizers_are_equal() -> None:
    one, other = Backend(), Backend()
    texts = [*plain_texts(one), *marked_texts(list(one.marks))]
    assert len(texts) > 200 and texts == [*plain_texts(other), *marked_texts(list(other.marks))]
    assert first_difference(one.encode_batch, other.encode_batch, texts) is None


@pytest.mark.parametrize("rule", PLAIN_RULES)
def test_plain_texts_show_a_rule(rule: str) -> None:
    one, other = Backend(), Backend(PLAIN_RULES[rule])
    texts = list(plain_texts(one))
    difference = first_difference(one.encode_batch, other.encode_batch, texts)
    assert difference is not None
    assert one.encode_batch([difference]) != other.encode_batch([difference])


@pytest.mark.parametrize("rule", MARK_RULES)
def test_marked_texts_show_how_a_mark_takes_what_is_around_it(rule: str) -> None:
    one, other = Backend(), Backend(MARK_RULES[rule])
    texts = list(marked_texts(list(one.marks)))
    assert first_difference(one.encode_batch, other.encode_batch, texts) is not None

"""A number's noun is in the singular for 1 alone."""

import pytest

from megatron_step.config.counts import counted


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 documents"), (1, "1 document"), (2, "2 documents"), (12345, "12,345 documents")]
)
def test_a_noun_agrees_with_its_number(number: int, words: str) -> None:
    assert counted(number, "document") == words


def test_a_plural_may_have_another_form() -> None:
    assert [counted(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]

from pathlib import Path

import pytest

from megatron_step.data.end_of_document import end_of_document_id
from megatron_step.data.tokenizer import end_of_document_line, load_tokenizer

TOKENS = {"<|endoftext|>": 7, "<|im_end|>": 9}


def test_the_chosen_token_wins_then_the_tokenizers_own_then_a_usual_one() -> None:
    assert end_of_document_id("its path", TOKENS.get, "<|endoftext|>", 9) == 7
    assert end_of_document_id("its path", TOKENS.get, None, 9) == 9
    assert end_of_document_id("its path", TOKENS.get, None, 0) == 0
    assert end_of_document_id("its path", TOKENS.get, None, None) == 7


def test_a_token_that_is_not_there_is_named_with_those_that_would_do() -> None:
    with pytest.raises(ValueError, match=r"its path lacks the token '</s>'.*such as <\|endoftext\|>"):
        end_of_document_id("its path", TOKENS.get, "</s>", 9)
    with pytest.raises(ValueError, match="no token to end a document"):
        end_of_document_id("its path", {"a": 0}.get, None, None)


def test_another_end_is_another_tokenizer(tokenizer_path: str, tmp_path: Path) -> None:
    own, chosen = load_tokenizer(tokenizer_path), load_tokenizer(tokenizer_path, "<s>")
    assert (own.eod_id, chosen.eod_id) == (2, 1)
    assert own.fingerprint != chosen.fingerprint
    assert load_tokenizer(tokenizer_path, "</s>").fingerprint == own.fingerprint
    assert end_of_document_line(chosen) == "documents end with '<s>' (id 1)"
    with pytest.raises(ValueError, match="lacks the token '<end>'"):
        load_tokenizer(tokenizer_path, "<end>")

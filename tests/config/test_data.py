"""The data section refuses blends and splits that mean nothing."""

import pytest

from megatron_step.config.data import DataConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": []}, "data.train is empty"),
        ({"train": [(0.0, "a")]}, "weight 0.0 of a must be a positive number"),
        ({"train": [(float("nan"), "a")]}, "must be a positive number"),
        ({"train": [(1.0, "a"), (2.0, "a")]}, "names a corpus twice"),
        ({"validation": []}, "data.validation is empty"),
        ({"validation": [(1.0, "b")], "split": (99, 1)}, "exclude each other"),
        ({"split": (0, 1)}, "two shares"),
        ({"split": (99, -1)}, "two shares"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"train": [(1.0, "a")], "tokenizer": "t", **fields})


def test_there_is_validation_where_a_corpus_or_a_share_is_set_aside() -> None:
    assert not DataConfig(train=[(1.0, "a")], tokenizer="t").has_validation
    assert not DataConfig(train=[(1.0, "a")], tokenizer="t", split=(100, 0)).has_validation
    assert DataConfig(train=[(1.0, "a")], tokenizer="t", split=(99, 1)).has_validation
    assert DataConfig(train=[(1.0, "a")], tokenizer="t", validation=[(1.0, "b")]).has_validation

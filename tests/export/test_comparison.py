"""Differences of logits are counted as they are."""

import pytest
import torch
from torch import Tensor

from megatron_step.export.comparison import Comparison, compare_logits


def one_hot(tokens: Tensor) -> Tensor:
    """Logits [b, s, 12] that are 4 at the token itself."""
    return 4.0 * torch.nn.functional.one_hot(tokens, 12)


def test_equal_models_differ_in_nothing() -> None:
    result = compare_logits(one_hot, one_hot, 10, 8)
    assert result == Comparison(0.0, 0.0, 4.0, 1.0)
    assert result.is_within_rounding("float32")


def test_a_difference_is_measured_within_the_vocabulary() -> None:
    def other(tokens: Tensor) -> Tensor:
        logits = one_hot(tokens)
        logits[:, ::2, 3] += 5.0  # at every second position: another likeliest token
        logits[..., 11] = 100.0  # padding
        return logits

    result = compare_logits(one_hot, other, 10, 8)
    assert result.max_difference == 5.0
    assert result.mean_difference == pytest.approx(5.0 / 10 / 2)
    assert 0.4 < result.agreement < 0.7
    assert not result.is_within_rounding("bfloat16")
    assert "differ by 5.00e+00 at most, 2.50e-01 on average" in str(result)


def test_what_rounding_explains_depends_on_the_number_format() -> None:
    result = Comparison(max_difference=0.01, mean_difference=0.001, largest_logit=2.0, agreement=1.0)
    assert [result.is_within_rounding(dtype) for dtype in ("float32", "float16", "bfloat16")] == [False, True, True]

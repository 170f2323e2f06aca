from dataclasses import dataclass
from math import inf, nan

import pytest

from megatron_step.config.numbers import check_finite, check_seed, nearest, remedy


@dataclass
class _Section:
    rate: float = 1.0
    shares: tuple[float, ...] = (1.0,)
    size: int | None = None


@pytest.mark.parametrize("values", [{"rate": inf}, {"rate": nan}, {"shares": (1.0, -inf)}])
def test_infinite_numbers_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=r"model\.\w+ must be a finite number"):
        check_finite("model", _Section(**values))
    check_finite("model", _Section())


def test_a_seed_must_suit_numpy() -> None:
    check_seed("data.seed", 2**32 - 1)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"data.seed must lie in .* not {seed}"):
            check_seed("data.seed", seed)


@pytest.mark.parametrize(
    ("value", "divisor", "expected"),
    [(128, 3, [126, 129]), (2, 3, [3]), (10**12, 10**12 + 1, []), (1, 16, [16]), (-3, 2, [2])],
)
def test_suggested_numbers_fit(value: int, divisor: int, expected: list[int]) -> None:
    assert nearest(value, lambda number: number % divisor == 0) == expected
    assert 0 not in nearest(value, lambda number: value % number == 0)


def test_a_remedy_names_what_there_is_to_choose() -> None:
    assert remedy(("a", [1, 2]), ("b", [])) == "set a to 1 or 2"
    assert remedy(("a", [1]), ("b", [4])) == "set a to 1, or b to 4"
    assert remedy(("a", []), ("b", [])) == "change a or b"

"""Tables are aligned, and bytes have readable units."""

import pytest

from megatron_step.report.text_table import aligned, format_bytes


def test_the_first_column_is_to_the_left_and_the_others_to_the_right() -> None:
    assert aligned([("stage", "layers"), ("1", "12")]) == "stage  layers\n1          12"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MiB"), (3 * 2**19, "1.5 MiB"), (2**30, "1.00 GiB"), (5 * 2**29, "2.50 GiB")]
)
def test_bytes_have_readable_units(count: int, text: str) -> None:
    assert format_bytes(count) == text

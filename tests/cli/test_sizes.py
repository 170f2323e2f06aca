"""A size has about as many parameters as its name says, and can be trained."""

import pytest

from megatron_step.cli.sizes import SIZES


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_as_large_as_its_name_says(name: str) -> None:
    wanted = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert SIZES[name].parameters == pytest.approx(wanted, rel=0.25)

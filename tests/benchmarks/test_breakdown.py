import pytest
import torch

from benchmarks.breakdown import PARTS, REST, step_breakdown


def test_shares_add_up_and_the_heaviest_part_leads():
    a = torch.randn(400, 400)
    shares = step_breakdown(lambda: torch.mm(a, a), steps=3)
    assert list(shares) == [*PARTS, REST]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(shares, key=shares.get) == "matrix products"


def test_a_sum_is_no_product():
    a = torch.randn(1000, 1000)
    shares = step_breakdown(lambda: a.add_(a), steps=3)
    assert shares["matrix products"] == 0
    assert shares["copies, sums and fills"] > 0.5

"""Values go into every format that training keeps, and come out as near as the format allows."""

import pytest
import torch

from megatron_step.engine.formats import decode, encode, tensor_type
from megatron_step.plan.states import BF16, FP32, INT8, RECIPES


def test_values_come_back_exactly_or_rounded() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert decode(encode(values, FP32)).data_ptr() == values.data_ptr(), "nothing is copied"
    assert torch.equal(decode(encode(values, BF16)), values.bfloat16().float())


@pytest.mark.parametrize("precision", ["fp32", "full"])
def test_a_trained_recipe_takes_the_bytes_of_its_tensors(precision: str) -> None:
    recipe = RECIPES[precision]
    for format in (recipe.weight, recipe.gradient, *recipe.optimizer_states("a", (24,)).values()):
        assert encode(torch.zeros(24), format).nbytes == format.bytes(24)


def test_a_format_of_plans_is_refused() -> None:
    with pytest.raises(ValueError, match="exists in plans only: training does not keep states in it"):
        tensor_type(RECIPES["adam8bit"].first_moment)
    with pytest.raises(ValueError, match="exists in plans only"):
        encode(torch.zeros(4), INT8)

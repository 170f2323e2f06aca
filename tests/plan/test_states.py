"""Bytes by each recipe are those counted by hand."""

import pytest
from small_run import small_config

from megatron_step.plan.states import MAIN_WEIGHT, MOMENTS, RECIPES, Parameter, copied_in_growth, recipe_of
from megatron_step.plan.trainable import Treatment

FROZEN, TRAINED = Treatment(False, "base", 0), Treatment(True, "base", 0)


@pytest.mark.parametrize(("name", "expected"), [("bf16", 186), ("fp32", 172), ("paper", 166)])
def test_ten_trained_elements_and_three_frozen_ones(name: str, expected: int) -> None:
    parameters = [Parameter("a", (2, 5), TRAINED), Parameter("b", (3,), FROZEN)]
    assert RECIPES[name].state_bytes(parameters) == expected


@pytest.mark.parametrize(("name", "states"), [("fp32", MOMENTS), ("bf16", (*MOMENTS, MAIN_WEIGHT))])
def test_a_checkpoint_has_a_main_weight_where_the_weight_is_narrower(name: str, states: tuple[str, ...]) -> None:
    assert RECIPES[name].optimizer_states == states


def test_bytes_of_a_save_are_those_counted_by_hand() -> None:
    """Ten elements, six of them trained: weights, and a rank's share of the optimizer states of the trained ones."""
    assert RECIPES["bf16"].saved_bytes(10, 6, 1) == 2 * 10 + (4 + 4 + 4) * 6
    assert RECIPES["fp32"].saved_bytes(10, 6, 1) == 4 * 10 + (4 + 4) * 6
    assert RECIPES["bf16"].saved_bytes(10, 6, 4) == 2 * 10 + (4 + 4 + 4) * 6 / 4


def test_growth_holds_the_sums_of_a_layer_or_a_tensor_that_is_read() -> None:
    assert copied_in_growth(10, 7) == 60
    assert copied_in_growth(10, 8) == 64


def test_a_moment_has_a_scale_for_each_block() -> None:
    recipe = RECIPES["adam8bit"]
    assert recipe.optimizer_bytes(4096) == (4 + 1 + 1) * 4096 + 2 * 4 * 16
    assert recipe.optimizer_bytes(4097) == (4 + 1 + 1) * 4097 + 2 * 4 * 17
    assert recipe.optimizer_bytes(4095) == (4 + 4 + 4) * 4095  # too small for 8 bits


def test_a_frozen_linear_has_a_scale_for_each_row() -> None:
    recipe = RECIPES["int8_base"]
    linear = "decoder.layers.0.mlp.linear_fc1.weight"
    assert recipe.frozen_bytes(Parameter(linear, (7, 100), FROZEN)) == 700 + 7 * 4
    for other, shape in (("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", (50,)), ("output_layer.weight", (9, 8))):
        parameter = Parameter(other, shape, FROZEN)
        assert recipe.frozen_bytes(parameter) == 2 * parameter.numel
    trained = Parameter(linear, (7, 100), TRAINED)
    assert recipe.state_bytes([trained]) == RECIPES["bf16"].state_bytes([trained])


def test_without_a_recipe_it_is_that_of_training() -> None:
    assert recipe_of(small_config(training={"precision": "fp32"})) is RECIPES["fp32"]
    named = small_config(training={"precision": "bf16"}, planner={"recipe": "adam8bit"})
    assert recipe_of(named) is RECIPES["adam8bit"]


def test_recipes_are_of_sixteen_bits() -> None:
    with pytest.raises(ValueError, match="planner.recipe adam8bit counts weights in 16 bits: set training.precision"):
        small_config(training={"precision": "fp32"}, planner={"recipe": "adam8bit"})

"""Bytes by each recipe are those counted by hand."""

import pytest
from small_run import small_config

from megatron_step.plan.states import (
    BF16,
    CORRECTION,
    FIRST_MOMENT,
    FP32,
    MAIN_WEIGHT,
    MOMENTS,
    RECIPES,
    REMAINDER,
    Parameter,
    Recipe,
    copied_in_growth,
    recipe_of,
    training_recipe,
)
from megatron_step.plan.trainable import Treatment

FROZEN, TRAINED = Treatment(False, "base", 0), Treatment(True, "base", 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", 2 * 13 + (4 + 4 + 8) * 10),
        ("fp32", 4 * 13 + (4 + 8) * 10),
        ("paper", 2 * 13 + (2 + 4 + 8) * 10),
        ("exact", 2 * 13 + (4 + 2 + 8) * 10),
        # Two moments with a bf16 scale for each of the two rows.
        ("compact", 2 * 13 + (2 + 2 + 2) * 10 + 2 * 2 * 2),
        ("smallest", 2 * 13 + (2 + 2) * 10 + 2 * 2 * 2),
    ],
)
def test_ten_trained_elements_and_three_frozen_ones(name: str, expected: int) -> None:
    parameters = [Parameter("a", (2, 5), TRAINED), Parameter("b", (3,), FROZEN)]
    assert RECIPES[name].state_bytes(parameters) == expected


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("fp32", MOMENTS),
        ("full", (*MOMENTS, MAIN_WEIGHT)),
        ("exact", (*MOMENTS, REMAINDER)),
        ("compact", (*MOMENTS, REMAINDER)),
        ("smallest", MOMENTS),
    ],
)
def test_a_checkpoint_has_what_a_weight_lacks(name: str, states: tuple[str, ...]) -> None:
    assert tuple(RECIPES[name].optimizer_states("a", (2, 5))) == states


def test_vectors_keep_fp32_moments() -> None:
    compact = RECIPES["compact"]
    assert compact.optimizer_bytes("a", (7,)) == (4 + 4 + 2) * 7
    assert [compact.optimizer_states("a", (7,))[name] for name in MOMENTS] == [FP32, FP32]


def test_a_block_ends_with_its_row_and_a_slice_has_the_scales_of_all_blocks_that_it_touches() -> None:
    format = RECIPES["compact"].first_moment
    assert format.slice_bytes(0, 3 * 100, 100) == 300 + 2 * 3 * 2  # blocks of 64 and 36
    assert format.slice_bytes(60, 70, 100) == 10 + 2 * 2
    assert format.slice_bytes(64, 100, 100) == 36 + 2
    assert format.slice_bytes(99, 101, 100) == 2 + 2 * 2
    assert format.slice_bytes(5, 5, 100) == 0


def test_the_sizes_at_a_real_width_are_those_of_the_table() -> None:
    """Bytes of a trained weight: weight, gradient and states of a matrix of 2,736 columns, which blocks do not fill."""
    shape = (1024, 2736)
    bytes_of = {
        name: (recipe.trained_bytes(1) + recipe.optimizer_bytes("a", shape) / (1024 * 2736))
        for name, recipe in RECIPES.items()
    }
    assert bytes_of["exact"] == 16
    assert 8.06 < bytes_of["compact"] < 8.07
    assert 6.06 < bytes_of["smallest"] < 6.07


def test_bytes_of_a_save_are_those_counted_by_hand() -> None:
    """Ten elements, six of them trained: weights, and a rank's share of the optimizer states of the trained ones."""
    parameters = [Parameter("a", (6,), TRAINED), Parameter("b", (4,), FROZEN)]
    assert RECIPES["full"].saved_bytes(parameters, 1) == 2 * 10 + (4 + 4 + 4) * 6
    assert RECIPES["fp32"].saved_bytes(parameters, 1) == 4 * 10 + (4 + 4) * 6
    assert RECIPES["full"].saved_bytes(parameters, 4) == 2 * 10 + (4 + 4 + 4) * 6 / 4
    assert RECIPES["smallest"].saved_bytes(parameters, 1) == 2 * 10 + (4 + 4) * 6
    assert RECIPES["full"].largest_tensor_bytes(parameters[0]) == 4 * 6
    assert RECIPES["full"].largest_tensor_bytes(parameters[1]) == 2 * 4


def test_growth_holds_the_sums_of_a_layer_or_a_tensor_that_is_read() -> None:
    assert copied_in_growth(10, 7) == 60
    assert copied_in_growth(10, 8) == 64


def test_a_moment_has_a_scale_for_each_block() -> None:
    recipe = RECIPES["adam8bit"]
    assert recipe.optimizer_bytes("a", (4096,)) == (4 + 1 + 1) * 4096 + 2 * 4 * 16
    assert recipe.optimizer_bytes("a", (4097,)) == (4 + 1 + 1) * 4097 + 2 * 4 * 17
    assert recipe.optimizer_bytes("a", (4095,)) == (4 + 4 + 4) * 4095  # too small for 8 bits


def test_a_frozen_linear_has_a_scale_for_each_row() -> None:
    recipe = RECIPES["int8_base"]
    linear = "decoder.layers.0.mlp.linear_fc1.weight"
    assert recipe.frozen_bytes(Parameter(linear, (7, 100), FROZEN)) == 700 + 7 * 4
    for other, shape in (("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", (50,)), ("output_layer.weight", (9, 8))):
        parameter = Parameter(other, shape, FROZEN)
        assert recipe.frozen_bytes(parameter) == 2 * parameter.numel
    trained = Parameter(linear, (7, 100), TRAINED)
    assert recipe.state_bytes([trained]) == RECIPES["full"].state_bytes([trained])


def test_without_a_recipe_it_is_that_of_training() -> None:
    assert recipe_of(small_config(training={"precision": "fp32"})) is RECIPES["fp32"]
    named = small_config(training={"precision": "bf16"}, planner={"recipe": "adam8bit"})
    assert recipe_of(named) is RECIPES["adam8bit"]


def test_training_takes_the_recipe_gradients_and_correction_of_the_config() -> None:
    def recipe(**optimizer: object) -> object:
        return training_recipe(small_config(training={"precision": "bf16"}, optimizer=optimizer))

    assert recipe() is RECIPES["full"]
    assert recipe(states="exact", gradients="bf16").gradient == BF16
    assert recipe(states="smallest", gradients="fp32").gradient == FP32
    assert tuple(recipe(states="compact", correction_bits=8).optimizer_states("a", (2, 5))) == (*MOMENTS, CORRECTION)


def test_muon_keeps_one_moment_of_a_layers_matrix() -> None:
    def recipe(**optimizer: object) -> Recipe:
        return training_recipe(small_config(training={"precision": "bf16"}, optimizer={"rule": "muon", **optimizer}))

    matrix, shape = "decoder.layers.3.mlp.linear_fc1.weight", (64, 128)
    compact = recipe(states="compact")
    assert tuple(compact.optimizer_states(matrix, shape)) == (FIRST_MOMENT, REMAINDER)
    assert tuple(compact.optimizer_states("output_layer.weight", shape)) == (*MOMENTS, REMAINDER)
    assert compact.optimizer_bytes(matrix, shape) == (1 + 2) * 64 * 128 + 2 * 64 * 2
    assert recipe().optimizer_bytes(matrix, shape) == (4 + 4) * 64 * 128
    wide = recipe(states="compact", momentum_bits=16)
    assert wide.optimizer_bytes(matrix, shape) == (2 + 2) * 64 * 128
    assert wide.optimizer_bytes("output_layer.weight", shape) == (1 + 1 + 2) * 64 * 128 + 2 * 2 * 64 * 2
    assert compact.rounds(wide) == "Muon's momentum is rounded to 8 bits"
    assert compact.rounds(recipe(states="exact")) == "the moments of matrices are rounded to 8 bits"
    assert wide.rounds(compact) == ""
    assert not wide.keeps_states_of(compact)


def test_momentum_bits_are_muons() -> None:
    for optimizer in ({"states": "compact"}, {"rule": "muon"}):
        with pytest.raises(ValueError, match=r"optimizer.momentum_bits 16 is for optimizer.rule muon with"):
            small_config(training={"precision": "bf16"}, optimizer={"momentum_bits": 16, **optimizer})


def test_recipes_are_of_sixteen_bits() -> None:
    with pytest.raises(ValueError, match="planner.recipe adam8bit counts weights in 16 bits: set training.precision"):
        small_config(training={"precision": "fp32"}, planner={"recipe": "adam8bit"})
    with pytest.raises(ValueError, match="optimizer.states compact needs weights in 16 bits: set training.precision"):
        small_config(training={"precision": "fp32"}, optimizer={"states": "compact"})
    with pytest.raises(ValueError, match="optimizer.gradients bf16 needs weights in 16 bits"):
        small_config(training={"precision": "fp32"}, optimizer={"gradients": "bf16"})
    with pytest.raises(ValueError, match="optimizer.correction_bits 8 is for optimizer.states compact, not exact"):
        small_config(training={"precision": "bf16"}, optimizer={"states": "exact", "correction_bits": 8})

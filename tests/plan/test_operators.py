"""Growth operators say for each layer of the larger model which layers it comes from."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_step.config.stages import GrowthConfig
from megatron_step.plan.operators import (
    GrownLayer,
    New,
    Old,
    Operator,
    describe_growth,
    first_layers,
    grow,
    operator_of,
    register,
)

POSITIONS = ["upper", "intermediate", "lower", "random"]
INITS = ["mean", "copy", "identity", "random"]


def _grown(num_old: int, num_new: int, seed: int = 1, **growth: Any) -> tuple[GrownLayer, ...]:
    return grow(first_layers(num_old, False), num_new, 1, GrowthConfig(**growth), seed)


def _pattern(layers: tuple[GrownLayer, ...]) -> str:
    return "".join("n" if layer.born else "o" for layer in layers)


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from(POSITIONS), st.sampled_from(INITS), st.integers(0, 1000))
def test_old_layers_stay_in_order_and_new_ones_lie_between(
    num_old: int, num_new: int, position: str, init: str, seed: int
) -> None:
    layers = _grown(num_old, num_new, seed, position=position, init=init)
    kept = [layer for layer in layers if layer.born == 0]
    assert [layer.sources for layer in kept] == [(index,) for index in range(num_old)]
    assert len(layers) == num_old + num_new
    below = -1
    for layer in layers:
        if layer.born == 0:
            below = layer.sources[0]
            continue
        above = below + 1
        if init == "random":
            assert layer.sources == ()
        elif init == "mean" and above < num_old:
            assert layer.sources == (below, above)
        else:
            assert layer.sources == (below,)
    if num_old > 1:
        assert (layers[0].born, layers[-1].born) == (0, 0), "the outermost layers stay where they are"
        counts = [len(run) for run in _pattern(layers)[1:-1].split("o")] if num_old > 2 else [num_new]
        assert max(counts) - min(counts) <= 1, "spread over the gaps"


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from(POSITIONS), st.integers(0, 1000))
def test_one_more_new_layer_is_put_in_among_the_others(num_old: int, num_new: int, position: str, seed: int) -> None:
    fewer, more = (_pattern(_grown(num_old, count, seed, position=position)) for count in (num_new, num_new + 1))
    assert any(more[:at] + more[at + 1 :] == fewer for at in range(len(more)) if more[at] == "n")


@pytest.mark.parametrize(
    ("position", "pattern"),
    [("upper", "ooonono"), ("intermediate", "oononoo"), ("lower", "ononooo")],
)
def test_positions(position: str, pattern: str) -> None:
    assert _pattern(_grown(5, 2, position=position)) == pattern


def test_of_two_middle_gaps_the_upper_is_the_first() -> None:
    assert _pattern(_grown(5, 1, position="intermediate")) == "ooonoo"
    assert _pattern(_grown(5, 3, position="intermediate")) == "oononono"


def test_random_positions_follow_the_seed() -> None:
    patterns = {_pattern(_grown(8, 3, seed, position="random")) for seed in range(20)}
    assert len(patterns) > 5
    assert _grown(8, 3, 4, position="random") == _grown(8, 3, 4, position="random")


def test_born_is_kept_through_stages() -> None:
    second = grow(first_layers(3, False), 2, 1, GrowthConfig(), 1)
    third = grow(second, 1, 2, GrowthConfig(), 1)
    assert [layer.born for layer in third if layer.born < 2] == [layer.born for layer in second]


def test_a_checkpoints_layers_are_their_own_sources() -> None:
    assert [layer.sources for layer in first_layers(3, True)] == [(0,), (1,), (2,)]
    assert [layer.sources for layer in first_layers(3, False)] == [()] * 3


@pytest.mark.parametrize("init", ["copy", "identity"])
def test_stack_repeats_the_whole_model(init: str) -> None:
    layers = _grown(3, 6, operator="stack", init=init)
    assert [layer.sources for layer in layers] == [(0,), (1,), (2,)] * 3
    assert _pattern(layers) == "ooonnnnnn"


def test_stack_refuses_a_part_of_the_model() -> None:
    with pytest.raises(ValueError, match="model: it cannot add 2 layers to 3. Let stage 2 add 3 in stages.layers"):
        _grown(3, 2, operator="stack", init="copy")


def test_only_identity_keeps_the_function() -> None:
    growths = {init: GrowthConfig(init=init) for init in INITS}  # type: ignore[arg-type]
    kept = {init: operator_of(growth).preserves_function(growth) for init, growth in growths.items()}
    assert kept == {"mean": False, "copy": False, "identity": True, "random": False}


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        (GrowthConfig(position="lower"), "interpolate, lower, mean"),
        (GrowthConfig(operator="stack", init="copy"), "stack, copy"),
        (GrowthConfig(operator="unknown here", init="copy"), "unknown here, copy"),
    ],
)
def test_growth_is_described_by_the_settings_that_it_uses(growth: GrowthConfig, text: str) -> None:
    assert describe_growth(growth) == text


def test_settings_that_no_operator_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="stack does not work with growth.init mean: choose copy, identity or random"):
        operator_of(GrowthConfig(operator="stack"))
    with pytest.raises(ValueError, match="growth.operator unknown is not registered: choose .*interpolate.* or "):
        operator_of(GrowthConfig(operator="unknown"))


class Repeat(Operator):
    """Every layer again in its place: a b c -> a a b b c c."""

    name = "repeat in place"
    inits = ("copy", "identity")
    adds = "as many layers as there are, or a multiple"

    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> list[Old | New]:
        times = num_new // num_layers
        return [place for layer in range(num_layers) for place in (Old(layer), *[New(layer)] * times)]

    def can_add(self, num_layers: int, num_new: int) -> bool:
        return num_new % num_layers == 0


class Careless(Repeat):
    name = "careless"
    placed: tuple[Old | New, ...] = ()

    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> list[Old | New]:
        return list(self.placed)


@pytest.fixture
def repeat() -> str:
    register(Repeat())
    return Repeat.name


def test_an_operator_of_a_users_own_grows(repeat: str) -> None:
    layers = _grown(3, 3, operator=repeat, init="copy")
    assert _pattern(layers) == "ononon"
    assert [layer.sources for layer in layers] == [(0,), (0,), (1,), (1,), (2,), (2,)]
    with pytest.raises(
        ValueError,
        match="or a multiple: it cannot add 2 layers to 3. Let stage 2 add 3",
    ):
        _grown(3, 2, operator=repeat, init="copy")


def test_a_name_belongs_to_one_operator(repeat: str) -> None:
    register(Repeat())  # as where its module is imported again
    other = Careless()
    other.name = repeat
    with pytest.raises(ValueError, match="a growth operator called repeat in place already exists"):
        register(other)
    other.inits = ("zeros",)
    with pytest.raises(ValueError, match=r"accepts the inits \['zeros'\]"):
        register(other)


@pytest.mark.parametrize("placed", [(Old(0), New(0)), (Old(0), Old(0), New(1)), (Old(0), Old(1), New(0), New(1))])
def test_an_operator_that_loses_a_layer_is_refused(placed: tuple[Old | New, ...]) -> None:
    operator = Careless()
    operator.can_add = lambda num_layers, num_new: True  # type: ignore[method-assign]
    operator.name, operator.placed = f"careless {len(placed)} {placed[1]}", placed
    register(operator)
    with pytest.raises(ValueError, match="must place each of the 2 old layers once, and add 1 new layer"):
        _grown(2, 1, operator=operator.name, init="copy")

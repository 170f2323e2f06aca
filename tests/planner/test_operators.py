"""Growth operators say for each layer of the larger model which layers it comes from."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_step.config.stages import GrowthConfig
from megatron_step.planner.operators import GrownLayer, first_layers, grow, preserves_function

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
    with pytest.raises(ValueError, match="cannot add 2 layers to 3; let that stage add 3 in stages.layers"):
        _grown(3, 2, operator="stack", init="copy")


def test_only_identity_keeps_the_function() -> None:
    kept = {init: preserves_function(GrowthConfig(init=init)) for init in INITS}  # type: ignore[arg-type]
    assert kept == {"mean": False, "copy": False, "identity": True, "random": False}

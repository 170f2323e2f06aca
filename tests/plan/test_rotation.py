"""A rotation trains the same number of layers in each turn, spread over the depth, and every layer equally often."""

import pytest

from megatron_step.plan.rotation import Rotation

SIZES = [(n, a) for n in (1, 2, 4, 7, 12) for a in range(1, n + 1)]


def _active(rotation: Rotation, turn: int) -> list[int]:
    return [layer for layer in range(rotation.num_layers) if rotation.is_active(layer, turn)]


@pytest.mark.parametrize("seed", [None, "1/2"])
@pytest.mark.parametrize(("n", "a"), SIZES)
def test_every_turn_trains_as_many_layers_and_every_cycle_each_layer_as_often(n: int, a: int, seed: str | None) -> None:
    rotation = Rotation(n, a, 5, seed)
    for cycle in range(3):
        turns = [_active(rotation, cycle * rotation.num_shifts + turn) for turn in range(rotation.num_shifts)]
        assert {len(active) for active in turns} == {a}
        assert {sum(layer in active for active in turns) for layer in range(n)} == {a * rotation.num_shifts // n}


def test_half_of_the_layers_alternate() -> None:
    assert [_active(Rotation(4, 2, 5), turn) for turn in range(3)] == [[0, 2], [1, 3], [0, 2]]


@pytest.mark.parametrize("seed", [None, "1/2"])
@pytest.mark.parametrize(("n", "a"), SIZES)
def test_steps_are_those_of_the_turns(n: int, a: int, seed: str | None) -> None:
    rotation = Rotation(n, a, 3, seed)
    for layer in range(n):
        trained = [rotation.is_active(layer, step // 3) for step in range(6 * n + 4)]
        for steps in range(len(trained)):
            assert rotation.active_steps(layer, steps) == sum(trained[:steps])
            if trained[steps]:
                rest = max((step + 1 for step in range(steps) if not trained[step]), default=0)
                assert rotation.steps_in_a_row(layer, steps, steps // 3) == steps - rest


def test_a_random_order_is_the_seeds() -> None:
    def turns(seed: str | None) -> list[list[int]]:
        return [_active(Rotation(12, 3, 5, seed), turn) for turn in range(24)]

    assert turns("1/1") == turns("1/1")
    assert len({str(turns(seed)) for seed in (None, "1/1", "2/1", "1/2")}) == 4
    assert turns("1/1")[:4] != turns("1/1")[4:8], "each cycle has another order"

"""Each matrix is whole on one rank, and each rank gets its part of the result."""

import pytest
import torch
from worlds import WorldError, Worlds

from megatron_step.optim.whole_matrices import Place, WholeMatrices
from megatron_step.plan.matrices import Matrix

SHAPES = [(4, 6), (2, 6), (5, 6), (1, 6), (3, 6)]
MATRICES = [Matrix(f"m{index}", rows, 0, rows, rows, columns) for index, (rows, columns) in enumerate(SHAPES)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_function_of_whole_matrices(worlds: Worlds, size: int) -> None:
    """Ranks hold columns of the first two matrices, and rows of the others, some of them none."""
    ranks = worlds(size).run(apply_on_columns_and_rows)
    assert sorted(matrix for applied, _ in ranks for matrix in applied) == sorted(SHAPES)
    assert max(len(applied) for applied, _ in ranks) == -(-len(SHAPES) // size)
    assert all(correct for _, correct in ranks)


def test_a_matrix_with_a_part_missing_or_held_twice_is_refused(worlds: Worlds) -> None:
    for twice in (True, False):
        with pytest.raises(WorldError, match="Muon needs each element of m0 once, but the ranks hold"):
            worlds(2).run(make_from_other_parts, twice=twice)


# What the ranks run.


def _places(rank: int, size: int) -> list[Place]:
    bounds = [6 * each // size for each in range(size + 1)]
    first, last = bounds[rank], bounds[rank + 1]
    places = [Place(matrix, 0, first, matrix.rows, last - first) for matrix in MATRICES[:2]]
    for matrix in MATRICES[2:]:
        rows = [row for row in range(matrix.rows) if row % size == rank]
        places += [Place(matrix, row, 0, 1, 6) for row in rows]
    return places


def _whole(matrix: Matrix) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(matrix.key[1:]))
    return torch.randn(matrix.rows, matrix.columns, generator=generator)


def _part(whole: torch.Tensor, place: Place) -> torch.Tensor:
    return whole[place.row : place.row + place.rows, place.column : place.column + place.columns]


def apply_on_columns_and_rows() -> tuple[list[tuple[int, ...]], bool]:
    """The shapes of this rank's whole matrices, and whether its parts of the results are right."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    places = _places(rank, size)
    matrices = WholeMatrices(places, torch.distributed.group.WORLD, torch.float32, torch.device("cpu"))
    applied, correct = [], []

    def cumulate(whole: torch.Tensor) -> torch.Tensor:
        applied.append(tuple(whole.shape))
        return whole.cumsum(0).cumsum(1)

    def read(number: int, values: torch.Tensor) -> None:
        values.copy_(_part(_whole(places[number].matrix), places[number]))

    def write(number: int, values: torch.Tensor) -> None:
        result = _whole(places[number].matrix).cumsum(0).cumsum(1)
        correct.append(torch.equal(values, _part(result, places[number])))

    matrices.apply(cumulate, read, write)
    return applied, all(correct) and len(correct) == len(places)


def make_from_other_parts(twice: bool) -> None:
    rank = torch.distributed.get_rank()
    rows = 4 if twice else 1
    place = Place(MATRICES[0], 0 if twice else rank, 0, rows, 6)
    WholeMatrices([place], torch.distributed.group.WORLD, torch.float32, torch.device("cpu"))

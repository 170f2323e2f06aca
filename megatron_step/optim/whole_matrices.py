"""Brings logical matrices, whose elements are spread over ranks, together on one rank each, and back.

Matrices are dealt to the ranks in rounds, the largest first: in a round each rank has one, and those of a round are
about as large. So the ranks work at the same time, and a rank has one whole matrix at a time in memory.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_step.plan.matrices import Matrix


class Place(NamedTuple):
    """A rectangle of a logical matrix."""

    matrix: Matrix
    """The matrix."""
    row: int
    """First row of the rectangle in the matrix."""
    column: int
    """First column of the rectangle in the matrix."""
    rows: int
    """Rows of the rectangle."""
    columns: int
    """Columns of the rectangle."""

    @property
    def numel(self) -> int:
        """Elements of the rectangle."""
        return self.rows * self.columns


@dataclass(frozen=True)
class _Round:
    """What this rank sends and receives for as many matrices as there are ranks."""

    numbers: list[int]
    """Numbers of this rank's places, in the order of the ranks to which their values go."""
    sent: list[int]
    """Elements for each rank."""
    matrix: Matrix | None
    """The matrix that is whole on this rank; None if there are fewer matrices than ranks."""
    places: list[Place]
    """Places of the values that arrive, in their order."""
    received: list[int]
    """Elements from each rank."""


class WholeMatrices:
    """The logical matrices of which the ranks of `group` hold the rectangles `places`; every rank must make it.

    Matrices are exchanged and computed in the type `dtype`.

    Raises ValueError if the rectangles of all ranks do not make up each matrix.
    """

    def __init__(self, places: Sequence[Place], group: ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
        self._group, self._dtype, self._device = group, dtype, device
        self._places = list(places)
        gathered: list[list[Place]] = [[]] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, self._places, group=group)
        matrices = sorted(_whole(gathered), key=lambda matrix: (-matrix.numel, matrix))
        size = len(gathered)
        self._rounds = [self._round(matrices[i : i + size], gathered) for i in range(0, len(matrices), size)]

    def apply(
        self,
        function: Callable[[Tensor], Tensor],
        read: Callable[[int, Tensor], None],
        write: Callable[[int, Tensor], None],
    ) -> None:
        """Apply `function` to each whole matrix, which it may overwrite; every rank must call it.

        `read` fills a tensor [rows, columns] with the values of the rectangle that has the given number in `places`.
        `write` takes its values of the result.
        """
        for turn in self._rounds:
            values = self._empty(sum(turn.sent))
            self._call(read, turn.numbers, values)
            values = self._exchange(values, turn.sent, turn.received)
            if turn.matrix is not None:
                whole = self._empty(turn.matrix.numel).view(turn.matrix.rows, turn.matrix.columns)
                _put_together(whole, values, turn.places)
                del values  # one copy less while the function works
                whole = function(whole)
                values = self._empty(whole.numel())
                _take_apart(whole, values, turn.places)
                del whole
            values = self._exchange(values, turn.received, turn.sent)
            self._call(write, turn.numbers, values)

    def _call(self, function: Callable[[int, Tensor], None], numbers: Sequence[int], values: Tensor) -> None:
        """Call `function` with each number and the values of its place; `values` has them one after another."""
        for number, view in zip(numbers, _views(values, [self._places[number] for number in numbers])):
            function(number, view)

    def _round(self, matrices: Sequence[Matrix], gathered: Sequence[Sequence[Place]]) -> _Round:
        rank = torch.distributed.get_rank(self._group)
        numbers = [[n for n, place in enumerate(self._places) if place.matrix == matrix] for matrix in matrices]
        numbers += [[] for _ in range(len(gathered) - len(matrices))]
        own = matrices[rank] if rank < len(matrices) else None
        sources = [[place for place in places if place.matrix == own] for places in gathered]
        return _Round(
            numbers=[n for some in numbers for n in some],
            sent=[sum(self._places[n].numel for n in some) for some in numbers],
            matrix=own,
            places=[place for some in sources for place in some],
            received=[sum(place.numel for place in some) for some in sources],
        )

    def _exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send `sent` elements to each rank, and return `received` elements from each."""
        if len(sent) == 1:
            return values
        result = self._empty(sum(received))
        torch.distributed.all_to_all_single(result, values, received, sent, group=self._group)
        return result

    def _empty(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self._dtype, device=self._device)


def _whole(gathered: Sequence[Sequence[Place]]) -> set[Matrix]:
    """Return the matrices of all ranks, if every element is on one of them."""
    held: dict[Matrix, int] = defaultdict(int)
    for place in (place for places in gathered for place in places):
        held[place.matrix] += place.numel
    for matrix, elements in held.items():
        if elements != matrix.numel:
            raise ValueError(
                f"Muon needs each element of {matrix.key} once, but the ranks hold {elements} elements of a matrix of "
                f"{matrix.numel}: set optimizer.rule to adamw"
            )
    return set(held)


def _views(values: Tensor, places: Sequence[Place]) -> Iterator[Tensor]:
    """Yield the values of each place [rows, columns], which follow one another."""
    for place, part in zip(places, values.split([place.numel for place in places])):
        yield part.view(place.rows, place.columns)


def _put_together(whole: Tensor, values: Tensor, places: Sequence[Place]) -> None:
    for place, view in zip(places, _views(values, places)):
        whole[place.row : place.row + place.rows, place.column : place.column + place.columns] = view


def _take_apart(whole: Tensor, values: Tensor, places: Sequence[Place]) -> None:
    for place, view in zip(places, _views(values, places)):
        view.copy_(whole[place.row : place.row + place.rows, place.column : place.column + place.columns])

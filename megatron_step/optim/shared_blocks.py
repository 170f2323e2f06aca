"""Largest magnitudes in blocks of 8-bit moments that the ranks of a world hold together.

Blocks lie on the grid of the whole weight. Where tensor-parallel ranks split a row, or data-parallel ranks the
flattened weight, off that grid, two ranks hold elements of one block. Its scale follows from the largest magnitude over
both: then every layout encodes the block as one rank would.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_step.engine.parallel import Parallel
from megatron_step.optim.pieces import Piece
from megatron_step.plan.states import MOMENT_BLOCK

BlockName: TypeAlias = tuple[str, int]
"""A block: the key of its whole weight, and its number in the flattened grid of the weight's blocks."""


class SharedBlocks:
    """The blocks that ranks with the same layers share. Every rank must make it, with the pieces that it owns."""

    def __init__(self, pieces: Sequence[Piece], parallel: Parallel) -> None:
        self._groups, self._device = (parallel.groups.tp, parallel.groups.dp_cp), parallel.device
        own = {name for piece in pieces for name in _names(piece)}
        for group in self._groups:
            gathered: list[set[BlockName]] = [set()] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(gathered, own, group=group)
            own = set().union(*gathered)
        self._count = len(own)
        place_of = {name: place for place, name in enumerate(sorted(own))}
        # Positions of a piece's shared blocks in the vector that ranks exchange: [rows, shared blocks of a row].
        self._places = {
            piece: torch.tensor([place_of[name] for name in _names(piece)], device=self._device).view(piece.rows, -1)
            for piece in pieces
            if piece.shared_blocks()
        }

    def __len__(self) -> int:
        return self._count

    def largest(self, peaks: Mapping[Piece, Tensor]) -> dict[Piece, Tensor]:
        """Return the peaks of shared blocks over all ranks, and 0 for other blocks.

        `peaks` has fp32 [moments, rows, blocks], one or two moments, for each piece with shared blocks. Every rank must
        call it.
        """
        together = torch.zeros(2, len(self), device=self._device)
        for piece, own in peaks.items():
            places = self._places[piece]
            known = together[: len(own)]
            known[:, places] = torch.maximum(known[:, places], own[:, :, piece.shared_blocks()])
        for group in self._groups:
            torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX, group=group)
        largest = {piece: torch.zeros_like(own) for piece, own in peaks.items()}
        for piece, piece_peaks in largest.items():
            piece_peaks[:, :, piece.shared_blocks()] = together[: len(piece_peaks), self._places[piece]]
        return largest


def _names(piece: Piece) -> list[BlockName]:
    """Names of a piece's shared blocks, row by row."""
    in_row = -(-piece.place.whole_columns // MOMENT_BLOCK)
    first = piece.place.first_row * in_row + piece.place.first_column // MOMENT_BLOCK
    shared = piece.shared_blocks()
    return [(piece.key, first + row * in_row + block) for row in range(piece.rows) for block in shared]

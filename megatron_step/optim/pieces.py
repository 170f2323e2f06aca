"""The rectangles of whole weights that this rank's optimizer updates, and empty states for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from megatron_step.engine.formats import tensor_type
from megatron_step.model.build import Sharded
from megatron_step.ops.compact_adamw import Rectangle
from megatron_step.ops.moment_codes import block_count
from megatron_step.optim.slices import rectangles
from megatron_step.plan.states import MOMENT_BLOCK, SCALE_SUFFIX, Format


@dataclass(frozen=True)
class Piece:
    """A rectangle of a whole weight within the elements that a rank owns of it. A vector is a matrix of one row."""

    key: str
    """Name of the whole weight in checkpoints."""
    start: int
    """First of its elements among the owned ones."""
    rows: int
    """Rows of the rectangle."""
    columns: int
    """Columns of the rectangle."""
    place: Rectangle
    """Where it is in the whole weight."""
    first_scale: int
    """First of its scales among those of the owned elements."""

    @property
    def blocks(self) -> int:
        """Blocks of 8-bit moments that each of its rows touches."""
        return block_count(self.columns, self.place.first_column)

    def of(self, flat: Tensor) -> Tensor:
        """View of its elements in a tensor of the owned elements: [rows, columns]."""
        return flat[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)

    def scales_of(self, flat: Tensor) -> Tensor:
        """View of its scales in a tensor of the owned elements' scales: [rows, blocks]."""
        return flat[self.first_scale : self.first_scale + self.rows * self.blocks].view(self.rows, self.blocks)

    def is_within(self, whole: "Piece") -> bool:
        """Whether its rows are rows of `whole`, a piece of the same rank with every column that the rank has."""
        row = self.place.first_row - whole.place.first_row
        return self.key == whole.key and 0 <= row < whole.rows

    def scales_within(self, whole: "Piece", flat: Tensor) -> Tensor:
        """View of its scales in a tensor of the scales of `whole`, a piece that it is within: [rows, blocks]."""
        row = self.place.first_row - whole.place.first_row
        block = self.place.first_column // MOMENT_BLOCK - whole.place.first_column // MOMENT_BLOCK
        return whole.scales_of(flat)[row : row + self.rows, block : block + self.blocks]

    def rows_between(self, first: int, last: int) -> "Piece":
        """Return the rectangle of its rows [first, last)."""
        return replace(
            self,
            start=self.start + first * self.columns,
            rows=last - first,
            place=replace(self.place, first_row=self.place.first_row + first),
            first_scale=self.first_scale + first * self.blocks,
        )

    def shared_blocks(self) -> list[int]:
        """Positions in a row of the blocks that other ranks may hold elements of: the first, the last, or both."""
        begins = self.place.first_column
        ends = begins + self.columns
        at_first = begins % MOMENT_BLOCK > 0
        at_last = ends % MOMENT_BLOCK > 0 and ends < self.place.whole_columns
        return sorted({*([0] if at_first else []), *([self.blocks - 1] if at_last else [])})


def weight_seed(seed: int, key: str) -> int:
    """Return the seed of a weight's random bits in a run of the seed `seed`."""
    return seed * 1_000_003 + crc32(key.encode())


def zero_states(formats: Mapping[str, Format], pieces: Sequence[Piece], device: torch.device) -> dict[str, Tensor]:
    """Return zero states in `formats`, flat and by name, of the elements that `pieces` of a weight make up."""
    elements = sum(piece.rows * piece.columns for piece in pieces)
    scales = sum(piece.rows * piece.blocks for piece in pieces)
    states: dict[str, Tensor] = {}
    for name, format in formats.items():
        states[name] = torch.zeros(elements, dtype=tensor_type(format), device=device)
        if format.scale_block:
            states[name + SCALE_SUFFIX] = torch.zeros(scales, dtype=torch.bfloat16, device=device)
    return states


def owned_pieces(shard: Sharded, elements: slice) -> Iterator[Piece]:
    """Yield the rectangles that the owned `elements` of a flattened weight consist of, in their order."""
    # Tensors without memory: only their places matter.
    index = torch.empty(elements.stop - elements.start, device="meta")
    first_scale = 0
    for part in rectangles(shard, elements, index):
        *row, column = part.global_offset
        *rows, columns = part.local_shape
        piece = Piece(
            key=part.key,
            start=part.data.storage_offset(),
            rows=rows[0] if rows else 1,
            columns=columns,
            place=Rectangle(row[0] if row else 0, column, part.global_shape[-1]),
            first_scale=first_scale,
        )
        first_scale += piece.rows * piece.blocks
        yield piece

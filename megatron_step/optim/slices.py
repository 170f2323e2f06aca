"""The rectangles of a tensor that a slice of its flattened elements covers.

The distributed optimizer gives each data-parallel rank a slice [start, stop) of a flattened weight [rows, columns].
A checkpoint keeps tensors in their shape, split into rectangles, so the slice is cut into at most three of them:

    the end of its first row  +  whole rows  +  the beginning of its last row

Each rank saves and loads its own rectangles: no rank ever needs another rank's states.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def pieces(shard: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return the tensors as which a weight is saved; their data are views of the weight's data."""
    return shard.build() if isinstance(shard, ShardedTensorFactory) else [shard]


def rectangles(
    shard: ShardedTensor | ShardedTensorFactory, owned: slice, flat: Tensor, is_replicated: bool = False
) -> Iterator[ShardedTensor]:
    """A state of the elements `owned` of a flattened weight, as sharded tensors whose data are views of `flat`.

    They keep the weight's keys. Each data-parallel rank saves its own, unless all have the same (`is_replicated`).
    """
    for piece in pieces(shard):
        # Each piece is a block of whole rows; the blocks follow one another in the weight's memory.
        first = (piece.data.data_ptr() - shard.data.data_ptr()) // piece.data.element_size()
        assert piece.data.is_contiguous()
        start, stop = max(owned.start, first), min(owned.stop, first + piece.data.numel())
        if start >= stop:
            continue
        for offset, shape in _parts(start - first, stop - first, piece.local_shape):
            begin = first + _flat_index(offset, piece.local_shape) - owned.start
            yield replace(
                piece,
                data=flat[begin : begin + prod(shape)].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_offset=tuple(map(sum, zip(piece.global_offset, offset))),
                axis_fragmentations=piece.axis_fragmentations if is_replicated else None,  # None: no regular grid
                # The last number is the data-parallel rank.
                replica_id=piece.replica_id if is_replicated else (*piece.replica_id[:-1], 0),
            )


def _parts(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return offset and shape of each rectangle that covers [start, stop) of a flattened vector or matrix."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    _, columns = shape
    while start < stop:
        row, column = divmod(start, columns)
        rows = (stop - start) // columns if column == 0 else 0
        if rows:
            yield (row, 0), (rows, columns)
            start += rows * columns
        else:
            length = min(columns - column, stop - start)
            yield (row, column), (1, length)
            start += length


def _flat_index(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    index = 0
    for start, size in zip(offset, shape):
        index = index * size + start
    return index

"""Dropout of an adapter's input. The mask is a hash of the element's index, so that backward needs no stored mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_step.ops.dispatch import use_kernel
from megatron_step.ops.index_hash import element_indices, random_bits


@dataclass(frozen=True)
class AdapterDropout:
    """A dropout mask over x; it depends on the seed, and not on how x is split over ranks.

    Raises:
        ValueError: a value is out of range.
    """

    probability: float
    """Probability that an element is dropped, at least 0 and below 1."""
    seed: int
    """Seed of the mask, at least 0 and below 2^63; masks of different seeds are independent."""
    first_column: int
    """Index of this rank's first column in the whole x."""
    num_columns: int
    """Columns of the whole x, over all ranks."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise ValueError(f"AdapterDropout: probability must be in [0, 1), got {self.probability}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"AdapterDropout: seed must be in [0, 2^63), got {self.seed}")
        if not 0 <= self.first_column < self.num_columns:
            raise ValueError(
                f"AdapterDropout: first_column must be in [0, {self.num_columns} columns), got {self.first_column}"
            )

    def check_columns(self, columns: int) -> None:
        """Raise ValueError if `columns` columns from `first_column` on go beyond the whole x."""
        if self.first_column + columns > self.num_columns:
            raise ValueError(
                f"AdapterDropout: x has columns {self.first_column} to {self.first_column + columns}, but num_columns "
                f"is {self.num_columns}: correct first_column or num_columns"
            )


def drop(x: Tensor, dropout: AdapterDropout, first_row: int = 0) -> Tensor:
    """Return mask * x as a new tensor, without autograd; x [tokens, k] begins at ``first_row`` of the whole x.

    Raises:
        ValueError: x has columns beyond those of the whole x.
    """
    dropout.check_columns(x.shape[-1])
    if use_kernel(x):
        first_index = first_row * dropout.num_columns + dropout.first_column
        return torch.ops.megatron_step.adapter_dropout(
            x, dropout.probability, dropout.seed, first_index, dropout.num_columns
        )
    return (x * dropout_mask_reference(x.shape, dropout, x.device, first_row)).to(x.dtype)


def dropout_mask(shape: Sequence[int], dropout: AdapterDropout, device: torch.device | str = "cpu") -> Tensor:
    """Return the mask over an x of this shape [..., columns] in float32: 0, or 1 / (1 - probability).

    Rows count over all leading dimensions. An element is dropped if the hash of the seed and of
    row * num_columns + column is below probability * 2^32. Ranks that hold other columns of x thus draw shards of one
    mask.

    Raises:
        ValueError: x has columns beyond those of the whole x.
    """
    rows = torch.Size(shape[:-1]).numel()
    return drop(torch.ones(rows, shape[-1], device=device), dropout).view(*shape)


def dropout_mask_reference(
    shape: Sequence[int], dropout: AdapterDropout, device: torch.device | str = "cpu", first_row: int = 0
) -> Tensor:
    """Return ``dropout_mask`` from ``first_row`` on, in plain torch."""
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    first_index = first_row * dropout.num_columns + dropout.first_column
    index = element_indices(rows, columns, first_index, dropout.num_columns, device)
    kept = random_bits(dropout.seed, index) >= min(round(dropout.probability * 2**32), 2**32 - 1)
    return (kept.float() * (1 / (1 - dropout.probability))).view(*shape)

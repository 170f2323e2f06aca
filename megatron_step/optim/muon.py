"""Muon (Jordan et al., 2024): momentum, orthogonalised over each whole logical matrix, is the update of the matrix.

The momentum is an elementwise state, in the same shards as AdamW's states. In a step each rank updates its part. One
rank gets all parts of a matrix and orthogonalises it. Each rank gets its part of the result and updates its weights. So
Muon computes the same in every layout, and never orthogonalises a part of a matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_step.ops.muon import MuonStep, advance_momentum_, apply_update_, momentum_peaks, update_scale
from megatron_step.ops.newton_schulz import orthogonalize
from megatron_step.optim.pieces import Piece, weight_seed
from megatron_step.optim.whole_matrices import Place, WholeMatrices
from megatron_step.plan.matrices import ELEMENTS_AT_ONCE, Matrix
from megatron_step.plan.states import CORRECTION, FIRST_MOMENT, REMAINDER, SCALE_SUFFIX


@dataclass(frozen=True)
class Part:
    """A rectangle of a logical matrix within the elements that a rank owns of a weight."""

    weight: Tensor
    """The owned elements: what the optimizer updates, and knows the states by."""
    piece: Piece
    """The rectangle in the whole weight."""
    place: Place
    """The rectangle in the matrix."""


def matrix_parts(weight: Tensor, pieces: Sequence[Piece], matrices: Sequence[Matrix]) -> Iterator[Part]:
    """Yield the parts of the `matrices` of a whole weight that the owned `pieces` consist of."""
    for piece in pieces:
        begin = piece.place.first_row
        for matrix in matrices:
            for first, last, row in matrix.runs(begin, begin + piece.rows):
                place = Place(matrix, row, piece.place.first_column, last - first, piece.columns)
                yield Part(weight, piece.rows_between(first - begin, last - begin), place)


class Muon:
    """Muon over the `parts` that this rank owns, of matrices that the ranks of `group` hold together.

    `momentum` is its decay. `seed` is that of stochastic rounding, the same on all ranks. Matrices are
    orthogonalised in `dtype`. Every rank of the group must make it, and call its methods.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        momentum: float,
        seed: int,
        group: ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._parts, self._momentum, self._seed = list(parts), momentum, seed
        self._matrices = WholeMatrices([part.place for part in parts], group, dtype, device)
        self.weights = list(dict.fromkeys(part.weight for part in parts))
        """The owned elements of each weight that it trains."""

    def peaks(
        self, optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor], gradient_factor: float
    ) -> dict[Piece, Tensor]:
        """Return the peaks of the momentum that the next step encodes, fp32 [1, rows, blocks], of pieces with blocks
        that ranks share. Arguments are those of `step`."""
        work = _Work(optimizer, gradients, self._momentum, gradient_factor)
        shared = (part for part in self._parts if work.has_scales(part) and part.piece.shared_blocks())
        return {
            part.piece: torch.cat(
                [
                    momentum_peaks(
                        *work.momentum(part, piece), work.gradient(part, piece), piece.place, work.hyper(part)
                    )
                    for _, piece in _chunks(part.piece)
                ],
                dim=1,
            )
            for part in shared
        }

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Mapping[Tensor, Tensor],
        gradient_factor: float = 1.0,
        peaks: Mapping[Piece, Tensor] | None = None,
    ) -> None:
        """Update the weights and their momentum in `optimizer`, whose groups have counted the step.

        `gradients` has fp32 or bf16 gradients by weight, and they are multiplied by `gradient_factor`. `peaks` has the
        largest peaks of blocks that ranks share.
        """
        work = _Work(optimizer, gradients, self._momentum, gradient_factor)

        def advance(number: int, ahead: Tensor) -> None:
            part = self._parts[number]
            shared = (peaks or {}).get(part.piece)
            for rows, piece in _chunks(part.piece):
                ahead[rows] = advance_momentum_(
                    *work.momentum(part, piece),
                    work.gradient(part, piece),
                    piece.place,
                    work.hyper(part),
                    weight_seed(self._seed, piece.key),
                    None if shared is None else shared[:, rows],
                )

        def update(number: int, orthogonal: Tensor) -> None:
            part = self._parts[number]
            scale = update_scale(part.place.matrix.rows, part.place.matrix.columns)
            for rows, piece in _chunks(part.piece):
                apply_update_(
                    *work.main(part, piece),
                    orthogonal[rows],
                    scale,
                    piece.place,
                    work.hyper(part),
                    weight_seed(self._seed, piece.key),
                )

        self._matrices.apply(orthogonalize, advance, update)


class _Work:
    """What one step works on, by part: weights, states and gradients, and the hyper-parameters."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor], momentum: float, factor: float
    ) -> None:
        self._states, self._gradients = optimizer.state, gradients
        self._hyper: dict[Tensor, MuonStep] = {
            weight: _hyper(group, momentum, factor)
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight in gradients
        }

    def hyper(self, part: Part) -> MuonStep:
        return self._hyper[part.weight]

    def gradient(self, part: Part, piece: Piece) -> Tensor:
        return piece.of(self._gradients[part.weight].view(-1))

    def has_scales(self, part: Part) -> bool:
        return FIRST_MOMENT + SCALE_SUFFIX in self._states[part.weight]

    def momentum(self, part: Part, piece: Piece) -> tuple[Tensor, Tensor | None]:
        states = self._states[part.weight]
        scales = states.get(FIRST_MOMENT + SCALE_SUFFIX)
        return piece.of(states[FIRST_MOMENT].view(-1)), None if scales is None else piece.scales_of(scales)

    def main(self, part: Part, piece: Piece) -> tuple[Tensor, Tensor | None]:
        states = self._states[part.weight]
        rest = states.get(REMAINDER, states.get(CORRECTION))
        return piece.of(part.weight.detach().view(-1)), None if rest is None else piece.of(rest)


def _hyper(group: Mapping[str, Any], momentum: float, factor: float) -> MuonStep:
    return MuonStep(group["lr"], momentum, group["weight_decay"], group["step"], factor)


def _chunks(piece: Piece) -> Iterator[tuple[slice, Piece]]:
    """Yield a few rows at a time: which they are in the piece, and their rectangle."""
    height = max(1, ELEMENTS_AT_ONCE // piece.columns)
    for first in range(0, piece.rows, height):
        last = min(first + height, piece.rows)
        yield slice(first, last), piece.rows_between(first, last)

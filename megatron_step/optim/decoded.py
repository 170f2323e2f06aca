"""Optimizer states of any recipe in fp32, and back: to carry states from one recipe into another.

What a recipe has no room for is rounded, to the nearest value that it can hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_step.ops.main_weight import add_correction, add_remainder, correction_of, join_main, remainder_of
from megatron_step.ops.moment_codes import (
    block_peaks,
    block_scales,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from megatron_step.optim.pieces import Piece
from megatron_step.plan.states import (
    CORRECTION,
    FIRST_MOMENT,
    MAIN_WEIGHT,
    MOMENTS,
    REMAINDER,
    SCALE_SUFFIX,
    SECOND_MOMENT,
)

_DECODE = {FIRST_MOMENT: decode_first, SECOND_MOMENT: decode_second}
_ENCODE = {FIRST_MOMENT: encode_first, SECOND_MOMENT: encode_second}
_HALF = 0x8000
"""Random bits that choose the nearer of two neighbours."""


@dataclass(frozen=True)
class DecodedStates:
    """States of the owned elements of a weight in fp32, flat."""

    main: Tensor
    """Main weights."""
    moments: dict[str, Tensor]
    """Both moments of Adam, or Muon's momentum, by name, in the order of MOMENTS."""


def decode_states(weight: Tensor, states: Mapping[str, Tensor], pieces: Sequence[Piece]) -> DecodedStates:
    """Decode the stored `states`, flat, of the owned elements `weight` [n], which `pieces` make up."""
    main = _main(weight, states)
    return DecodedStates(main, {name: decode_moment(name, states, pieces) for name in MOMENTS if name in states})


def decode_moment(name: str, states: Mapping[str, Tensor], pieces: Sequence[Piece]) -> Tensor:
    """Return the fp32 moment `name` of the stored `states`, flat; the stored tensor itself where that is fp32."""
    stored, scales = states[name], states.get(name + SCALE_SUFFIX)
    if scales is None:
        return stored.float()
    values = torch.empty(stored.shape, device=stored.device)
    for piece in pieces:
        decoded = _DECODE[name](piece.of(stored), piece.scales_of(scales), piece.place.first_column)
        piece.of(values).copy_(decoded)
    return values


def _main(weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
    if MAIN_WEIGHT in states:
        return states[MAIN_WEIGHT]
    if CORRECTION in states:
        return add_correction(weight, states[CORRECTION])
    if REMAINDER not in states:
        return weight.float()
    if keeps_ties(states):
        return join_main(weight, states[REMAINDER], states[SECOND_MOMENT])
    return add_remainder(weight, states[REMAINDER])


def keeps_ties(states: Mapping[str, Tensor]) -> bool:
    """Whether the signs of the second moments are a part of the main weights (ops/main_weight.py)."""
    return REMAINDER in states and SECOND_MOMENT in states and states[SECOND_MOMENT].dtype == torch.float32


def moment_peaks(decoded: DecodedStates, piece: Piece) -> Tensor:
    """Return the largest magnitudes of the moments in each block of a piece: fp32 [moments, rows, blocks]."""
    column = piece.place.first_column
    return torch.stack([block_peaks(piece.of(moment), column) for moment in decoded.moments.values()])


def encode_states_(
    decoded: DecodedStates,
    weight: Tensor,
    pieces: Sequence[Piece],
    states: Mapping[str, Tensor],
    shared: Mapping[Piece, Tensor],
) -> None:
    """Write decoded states into the stored `states`, in place; the weights stay as they are.

    `shared` has the peaks of blocks that ranks share, and 0 for others, by piece: fp32 [moments, rows, blocks].
    """
    for index, (name, values) in enumerate(decoded.moments.items()):
        scales = states.get(name + SCALE_SUFFIX)
        if scales is None:
            states[name].copy_(values)
            continue
        for piece in pieces:
            column = piece.place.first_column
            piece_values, stored_scale = piece.of(values), piece.scales_of(scales)
            peaks = block_peaks(piece_values, column)
            stored_scale.copy_(block_scales(torch.maximum(peaks, shared[piece][index]) if piece in shared else peaks))
            scale = stored_scale.to(piece_values.device)  # a weight that rests has its states on the host
            half = torch.full(piece_values.shape, _HALF, device=piece_values.device)
            piece.of(states[name]).copy_(_ENCODE[name](piece_values, scale, half, column))
    if MAIN_WEIGHT in states:
        states[MAIN_WEIGHT].copy_(decoded.main)
    if CORRECTION in states:
        states[CORRECTION].copy_(correction_of(decoded.main, weight))
    if REMAINDER in states:
        remainder, tie = remainder_of(decoded.main, weight)
        states[REMAINDER].copy_(remainder)
        if keeps_ties(states):
            second = states[SECOND_MOMENT].view(torch.int32)
            second.bitwise_or_((tie.int() << 31).to(second.device))

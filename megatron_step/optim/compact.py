"""AdamW on bf16 weights with compact states: which tensors it keeps of a weight, and its step; Muon where it trains."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_step.engine.compat.optimizers import separate_gradient
from megatron_step.engine.formats import tensor_type
from megatron_step.ops.compact_adamw import AdamWStep, CompactStates, compact_adamw_, compact_adamw_peaks
from megatron_step.ops.main_weight import join_main, split_main_
from megatron_step.optim.adam import FusedAdam, update_
from megatron_step.optim.muon import Muon
from megatron_step.optim.pieces import Piece, weight_seed, zero_states
from megatron_step.optim.shared_blocks import SharedBlocks
from megatron_step.plan.states import (
    CORRECTION,
    FIRST_MOMENT,
    FP32,
    REMAINDER,
    SCALE_SUFFIX,
    SECOND_MOMENT,
    Format,
)

_CHUNK = 1 << 16
"""Elements whose main weights `exact` has in memory at once."""


class CompactAdamW(FusedAdam):
    """AdamW by a recipe of compact states. Gradients are in `decoupled_grad`, bf16 or fp32.

    `own` gives it each weight with its states, before the first step.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.gradient_scale = 1.0
        """Factor of all gradients in the next step, at most 1."""
        self._pieces: dict[Tensor, list[Piece]] = {}
        self._shared: SharedBlocks | None = None
        self._seed = 0

    def own(self, param: Tensor, pieces: Sequence[Piece], formats: Mapping[str, Format]) -> None:
        """Allocate zero states in `formats`, by name, of an owned slice of a weight; `pieces` make up the slice."""
        self._pieces[param] = list(pieces)
        self.state[param].update(zero_states(formats, pieces, param.device))

    def pieces_of(self, param: Tensor) -> list[Piece]:
        """Return the rectangles of whole weights that an owned slice consists of."""
        return self._pieces[param]

    def share(self, shared: SharedBlocks, seed: int) -> None:
        """Set the blocks of moments that ranks share, and the seed of stochastic rounding, the same on all ranks."""
        self._shared, self._seed = shared, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch allows a closure, megatron-core has none
        """Update every weight."""
        self.count_step()
        peaks = self._largest_peaks()
        for group in self.adamw_groups():
            for param in group["params"]:
                if self._is_exact(param):
                    self._step_exact(param, group)
                    continue
                for piece in self._pieces[param]:
                    seed = weight_seed(self._seed, piece.key)
                    states, gradient = self._states_of(param, piece), self._gradient_of(param, piece)
                    compact_adamw_(states, gradient, piece.place, self._hyper(group), seed, peaks.get(piece))
        if self.muon is not None:
            self.muon.step(self, self._muon_gradients(self.muon), self.gradient_scale, peaks)

    def _is_exact(self, param: Tensor) -> bool:
        """Whether the states are those of fp32 training, in fewer bytes."""
        states = self.state[param]
        return REMAINDER in states and states[FIRST_MOMENT].dtype == tensor_type(FP32)

    def _step_exact(self, param: Tensor, group: dict[str, Any]) -> None:
        """Update a weight with torch's AdamW, so that every bit is that of training with fp32 main weights."""
        states = self.state[param]
        every = (param, separate_gradient(param), states[REMAINDER], states[FIRST_MOMENT], states[SECOND_MOMENT])
        for weight, gradient, remainder, first, second in zip(*(tensor.split(_CHUNK) for tensor in map(_flat, every))):
            main = join_main(weight, remainder, second)
            gradient = gradient.float()
            if self.gradient_scale < 1:
                gradient = gradient * self.gradient_scale
            update_(group, [main], [gradient], [first], [second])
            split_main_(main, weight, remainder, second)

    def _largest_peaks(self) -> dict[Piece, Tensor]:
        """Return the largest peaks of the blocks that ranks share, by piece."""
        if not self._shared:
            return {}
        peaks = {
            piece: compact_adamw_peaks(
                self._states_of(param, piece), self._gradient_of(param, piece), piece.place, self._hyper(group)
            )
            for group, param, piece in self._with_shared_blocks()
        }
        if self.muon is not None:
            peaks |= self.muon.peaks(self, self._muon_gradients(self.muon), self.gradient_scale)
        return self._shared.largest(peaks)

    def _muon_gradients(self, muon: Muon) -> dict[Tensor, Tensor]:
        return {param: separate_gradient(param) for param in muon.weights}

    def _with_shared_blocks(self) -> Iterator[tuple[dict[str, Any], Tensor, Piece]]:
        for group in self.adamw_groups():
            for param in group["params"]:
                if FIRST_MOMENT + SCALE_SUFFIX in self.state[param]:
                    yield from ((group, param, piece) for piece in self._pieces[param] if piece.shared_blocks())

    def _states_of(self, param: Tensor, piece: Piece) -> CompactStates:
        states = self.state[param]
        remainder = states.get(REMAINDER, states.get(CORRECTION))
        scales = [states.get(name + SCALE_SUFFIX) for name in (FIRST_MOMENT, SECOND_MOMENT)]
        first_scale, second_scale = (None if scale is None else piece.scales_of(scale) for scale in scales)
        return CompactStates(
            weight=piece.of(_flat(param)),
            remainder=None if remainder is None else piece.of(remainder),
            first=piece.of(states[FIRST_MOMENT]),
            second=piece.of(states[SECOND_MOMENT]),
            first_scale=first_scale,
            second_scale=second_scale,
        )

    def _gradient_of(self, param: Tensor, piece: Piece) -> Tensor:
        return piece.of(_flat(separate_gradient(param)))

    def _hyper(self, group: dict[str, Any]) -> AdamWStep:
        beta1, beta2 = group["betas"]
        numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"])
        return AdamWStep(*numbers, gradient_factor=self.gradient_scale)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)

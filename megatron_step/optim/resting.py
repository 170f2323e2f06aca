"""Optimizer states that wait on the host while their weights rest, divided over data-parallel ranks.

A resting weight has its states in its attribute `resting`, a `Held`. Each data-parallel rank has an equal share of the
weight's elements. A weight that is trained again takes the elements that the optimizer then owns, from all ranks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import Sharded
from megatron_step.optim.owned import Held
from megatron_step.optim.pieces import Piece, owned_pieces, zero_states
from megatron_step.plan.states import MAIN_WEIGHT, SCALE_SUFFIX, Recipe, share

HOST = torch.device("cpu")


def rest(shard: Sharded, recipe: Recipe, parallel: Parallel) -> None:
    """Give a resting weight states on the host, zero by `recipe`; its main weight is what the weight is now."""
    elements = slice(*share(shard.data.numel(), parallel.dp_size, parallel.dp_rank))
    formats = recipe.optimizer_states(shard.key, shard.data.shape)
    states = zero_states(formats, list(owned_pieces(shard, elements)), HOST)
    if MAIN_WEIGHT in states:
        states[MAIN_WEIGHT].copy_(shard.data.detach().flatten()[elements])
    shard.data.resting = Held(elements, {name: _copy(state, parallel) for name, state in states.items()}, False)


def on_host(own: Held, shard: Sharded, recipe: Recipe, parallel: Parallel) -> Held:
    """Return copies on the host of the states by `recipe` that this rank has of a weight."""
    names = zero_states(recipe.optimizer_states(shard.key, shard.data.shape), [], HOST)
    copies = {name: _copy(own.states[name], parallel) for name in names}
    return Held(own.elements, copies, own.is_replicated)


def gathered(own: Held | None, shard: Sharded, recipe: Recipe, parallel: Parallel) -> dict[str, Tensor]:
    """Return all states by `recipe` of a tensor-parallel rank's weight, flat and by name, on the device.

    Each data-parallel rank gives what it has, `own`; None for nothing. All of them must call it.
    """
    whole_pieces = list(owned_pieces(shard, slice(0, shard.data.numel())))
    whole = zero_states(recipe.optimizer_states(shard.key, shard.data.shape), whole_pieces, parallel.device)
    if own is not None:
        for part, waiting in _views(shard, own.elements, whole_pieces, whole, own.states):
            part.copy_(waiting)
    if parallel.dp_size > 1 and not (own is not None and own.is_replicated):
        for state in whole.values():
            # Ranks that hold the same element have the same bytes of it, and the others zeros: any type is exact.
            torch.distributed.all_reduce(
                state.view(torch.uint8), torch.distributed.ReduceOp.MAX, group=parallel.groups.dp_cp
            )
    return whole


def take(whole: Mapping[str, Tensor], shard: Sharded, own: Held) -> None:
    """Fill the states of the elements `own` from those of the `whole` weight."""
    whole_pieces = list(owned_pieces(shard, slice(0, shard.data.numel())))
    for part, waiting in _views(shard, own.elements, whole_pieces, whole, own.states):
        waiting.copy_(part)


def _views(
    shard: Sharded,
    elements: slice,
    whole_pieces: Sequence[Piece],
    whole: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of views of the same numbers: in the states of the whole weight, and in those of `elements`."""
    views = []
    pieces = list(owned_pieces(shard, elements))
    for name, state in whole.items():
        if not name.endswith(SCALE_SUFFIX):
            views.append((state[elements], states[name]))
            continue
        for piece in pieces:
            (whole_piece,) = [one for one in whole_pieces if piece.is_within(one)]
            views.append((piece.scales_within(whole_piece, state), piece.scales_of(states[name])))
    return views


def _copy(tensor: Tensor, parallel: Parallel) -> Tensor:
    """Return a copy on the host, in memory that a device reads and writes at full speed."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=parallel.device.type == "cuda")
    return copy.copy_(tensor.detach())

"""Loads optimizer states, of the run's recipe or of another."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_step.checkpoint.load import load_tensors
from megatron_step.checkpoint.sharding import sharded_optimizer_states, state_tensors
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import Sharded
from megatron_step.optim.decoded import DecodedStates, decode_states, encode_states_, moment_peaks
from megatron_step.optim.owned import Held, held
from megatron_step.optim.pieces import Piece, owned_pieces, zero_states
from megatron_step.optim.shared_blocks import SharedBlocks
from megatron_step.plan.states import Recipe

_WEIGHTS_AT_ONCE = 8
"""Weights whose states are in memory twice while they are carried into another recipe."""


def load_states(
    path: Path,
    optimizer: MegatronOptimizer,
    weights: Mapping[str, Sharded],
    saved: Recipe,
    recipe: Recipe,
    parallel: Parallel,
    *,
    shared: bool = False,
) -> None:
    """Load the states of the trained and resting `weights`, which hold their values already, in place.

    Every rank must call it.
    The checkpoint in `path` has states by the recipe `saved`, the optimizer by `recipe`. Where the two differ, values
    are rounded to the nearest that `recipe` holds. `shared` is for ranks that ask for the same parts.

    Raises ValueError if the checkpoint lacks a state, has another shape of it, or holds values that are not finite.
    """
    shared = shared or saved.first_moment.scale_block is not None  # ranks ask for the scales of blocks that they share
    if recipe.keeps_states_of(saved):
        load_tensors(path, sharded_optimizer_states(optimizer, weights, recipe), shared=shared)
        return
    for some in _in_turns(optimizer, weights, parallel):
        _convert(path, some, saved, parallel, shared)


def _in_turns(
    optimizer: MegatronOptimizer, weights: Mapping[str, Sharded], parallel: Parallel
) -> Iterator[list[tuple[Sharded, Held]]]:
    """Yield a few weights at a time, with what this rank owns of them; every rank gets as many lists."""
    own_states = [(shard, own) for shard in weights.values() if (own := held(optimizer, shard.data)) is not None]
    turns = torch.tensor(-(-len(own_states) // _WEIGHTS_AT_ONCE), device=parallel.device)
    torch.distributed.all_reduce(turns, op=torch.distributed.ReduceOp.MAX)
    for turn in range(int(turns)):
        yield own_states[turn * _WEIGHTS_AT_ONCE : (turn + 1) * _WEIGHTS_AT_ONCE]


def _convert(path: Path, weights: list[tuple[Sharded, Held]], saved: Recipe, parallel: Parallel, shared: bool) -> None:
    """Load the states of a few weights as they are saved, and carry them into the optimizer's recipe."""
    pieces = [list(owned_pieces(shard, own.elements)) for shard, own in weights]
    loaded = [
        zero_states(saved.optimizer_states(shard.key, shard.data.shape), weight_pieces, parallel.device)
        for (shard, _), weight_pieces in zip(weights, pieces)
    ]
    requests: dict[str, ShardedTensor] = {}
    for (shard, own), states in zip(weights, loaded):
        requests |= state_tensors(shard, own, states, saved)
    load_tensors(path, requests, shared=shared)
    values = [shard.data.detach().flatten()[own.elements] for shard, own in weights]
    decoded = [decode_states(*each) for each in zip(values, loaded, pieces)]
    peaks = _shared_peaks(decoded, pieces, parallel)
    for index, (_, own) in enumerate(weights):
        encode_states_(decoded[index], values[index], pieces[index], own.states, peaks)


def _shared_peaks(decoded: list[DecodedStates], pieces: list[list[Piece]], parallel: Parallel) -> dict[Piece, Tensor]:
    """Return the largest magnitudes of blocks that ranks share, by piece."""
    blocks = SharedBlocks([piece for weight_pieces in pieces for piece in weight_pieces], parallel)
    own = {
        piece: moment_peaks(states, piece)
        for states, weight_pieces in zip(decoded, pieces)
        for piece in weight_pieces
        if piece.shared_blocks()
    }
    return blocks.largest(own) if len(blocks) else {}

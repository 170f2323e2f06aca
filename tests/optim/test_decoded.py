"""Main weights of every recipe come back; what has no room goes to the nearest value."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_step.optim.decoded import DecodedStates, decode_states, encode_states_
from megatron_step.optim.pieces import owned_pieces
from megatron_step.plan.states import CORRECTION, FIRST_MOMENT, MAIN_WEIGHT, REMAINDER, SECOND_MOMENT


def _values() -> tuple[torch.Tensor, DecodedStates]:
    """Main weights at every place between two bf16 numbers, ties of both kinds among them, and moments."""
    halves = torch.arange(0, 2**16, 16, dtype=torch.int32)
    main = torch.cat([(torch.tensor(upper << 16) + halves).int() for upper in (0x3F80, 0x3F81)]).view(torch.float32)
    generator = torch.Generator().manual_seed(1)
    moments = {
        FIRST_MOMENT: torch.randn(len(main), generator=generator),
        SECOND_MOMENT: torch.rand(len(main), generator=generator),
    }
    return main.bfloat16(), DecodedStates(main, moments)


@pytest.mark.parametrize(
    ("name", "dtype", "error"),
    [(MAIN_WEIGHT, torch.float32, 0), (REMAINDER, torch.int16, 0), (CORRECTION, torch.int8, 128), (None, None, 2**15)],
)
def test_main_weights_come_back_as_near_as_there_is_room(name: str | None, dtype: torch.dtype, error: int) -> None:
    weight, decoded = _values()
    states = {moment: torch.empty(len(weight)) for moment in (FIRST_MOMENT, SECOND_MOMENT)}
    if name is not None:
        states[name] = torch.empty(len(weight), dtype=dtype)
    shard = ShardedTensor.from_rank_offsets("w", weight.view(2, -1), replica_id=(0, 0, 0))
    pieces = list(owned_pieces(shard, slice(0, len(weight))))
    encode_states_(decoded, weight, pieces, states, {})
    again = decode_states(weight, states, pieces)
    distance = (again.main.view(torch.int32) - decoded.main.view(torch.int32)).abs()
    # A tie that rounded down is half a bf16 step above its weight: 8 bits reach to the step's last 256th alone.
    assert int(distance.max()) <= (256 if name == CORRECTION else error)
    assert all(torch.equal(again.moments[moment], decoded.moments[moment]) for moment in again.moments)

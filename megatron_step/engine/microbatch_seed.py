"""The seed of the micro-batch that a layer works on.

megatron-core's random-number tracker holds the seed. When recompute runs a layer of an earlier micro-batch again, it
restores the tracker's states, and with them the seed.
"""

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

_NAME = "micro-batch seed"


def set_microbatch_seed(seed: int) -> None:
    """Set the seed of the next micro-batch, 0 <= seed < 2^62."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), _NAME: torch.tensor(seed)})


def microbatch_seed() -> int:
    """Return the seed of the micro-batch whose forward pass runs, also when recompute runs it again."""
    return int(get_cuda_rng_tracker().get_states()[_NAME])

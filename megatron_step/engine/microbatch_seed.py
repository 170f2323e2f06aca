"""The seed of the micro-batch that a layer works on.

It lies among the states of megatron-core's random-number tracker, which recompute puts back to what they were when it
runs a layer of an earlier micro-batch again.
"""

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

_NAME = "micro-batch seed"


def set_microbatch_seed(seed: int) -> None:
    """Say which micro-batch comes next; 0 <= seed < 2^62."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), _NAME: torch.tensor(seed)})


def microbatch_seed() -> int:
    """The seed of the micro-batch whose forward pass runs, for the first time or again."""
    return int(get_cuda_rng_tracker().get_states()[_NAME])

"""A layer sees its micro-batch's seed, also when recompute runs it again after other micro-batches have begun."""

import torch
from megatron.core import tensor_parallel

from megatron_step.engine.microbatch_seed import microbatch_seed, set_microbatch_seed
from megatron_step.engine.parallel import Parallel


def test_the_last_one_counts(alone: Parallel) -> None:
    set_microbatch_seed(3)
    set_microbatch_seed(2**62 - 1)
    assert microbatch_seed() == 2**62 - 1


def test_a_fork_of_the_random_numbers_leaves_it(alone: Parallel) -> None:
    """Under sequence parallelism megatron-core runs its layers in one."""
    set_microbatch_seed(5)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert microbatch_seed() == 5


def test_recompute_sees_the_seed_of_its_own_forward_pass(alone: Parallel) -> None:
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(microbatch_seed())
        return x * 2

    outputs = []
    for seed in (11, 12):
        set_microbatch_seed(seed)
        outputs.append(tensor_parallel.checkpoint(layer, False, torch.ones(3, requires_grad=True)))
    for output in outputs:
        output.sum().backward()
    assert seen == [11, 12, 11, 12]
    assert microbatch_seed() == 12

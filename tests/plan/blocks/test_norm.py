"""A norm keeps its input and a scale of each token."""

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import Tape


def test_bytes_by_hand() -> None:
    batch = Microbatch(tokens=10, element_bytes=4, tensor=1, sequence_parallel=False)
    norm = Norm("norm", 8)
    costs = norm.costs(batch)
    assert costs.weights == (("norm", (8,)),)
    assert costs.kept == 320 + 40
    tape = Tape(live=costs.kept + 2 * 320)  # the gradients of its output and of the stream
    tape.follow(costs.backward)
    assert (tape.live, tape.peak) == (320, 1000 + 320)  # the sum is left

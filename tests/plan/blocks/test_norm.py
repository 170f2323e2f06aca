"""A norm keeps its input and a scale of each token."""

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.norm import Norm
from megatron_step.plan.blocks.tape import Tape


def test_bytes_by_hand() -> None:
    batch = Microbatch(tokens=10, element_bytes=4, tensor=1, sequence_parallel=False)
    norm = Norm("norm", 8)
    assert list(norm.weights()) == [("norm", (8,))]
    assert norm.kept(batch) == 320 + 40
    tape = Tape(live=norm.kept(batch) + 2 * 320)  # the gradients of its output and of the stream
    norm.backward(tape, batch)
    assert (tape.live, tape.peak) == (320, 1000 + 320)  # the sum is left

"""Bytes of a micro-batch's tensors are those counted by hand."""

from megatron_step.plan.blocks.microbatch import Microbatch


def test_what_is_whole_split_and_in_the_stream() -> None:
    batch = Microbatch(tokens=10, element_bytes=2, tensor=4, sequence_parallel=False)
    assert (batch.whole(8), batch.split(8), batch.stream(8), batch.norm_scale) == (160, 40, 160, 40)
    assert (batch.matrix(3, 5), batch.weight_gradient(3, 5)) == (30, 30)
    over_sequence = Microbatch(tokens=10, element_bytes=2, tensor=2, sequence_parallel=True)
    assert (over_sequence.stream(8), over_sequence.norm_scale) == (80, 20)


def test_a_tall_gradient_in_fp32_is_made_twice() -> None:
    batch = Microbatch(tokens=10, element_bytes=4, tensor=1, sequence_parallel=False)
    assert (batch.weight_gradient(5, 3), batch.weight_gradient(3, 5)) == (2 * 60, 60)

"""The embedding is split by rows, and its gradient is as large as its part."""

from small_run import VOCAB_SIZE, small_config

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.resolved import resolve


def test_rows_are_padded_and_split() -> None:
    embedding = resolve(small_config(), VOCAB_SIZE).blocks.embedding
    costs = embedding.costs(Microbatch(tokens=10, element_bytes=4, tensor=2, sequence_parallel=False))
    assert [shape for _, shape in costs.weights] == [(128, 64)]
    assert costs.gradient == 4 * 128 * 64
    assert costs.kept == 9 * 10
    assert costs.backward == 3 * 4 * 10 * 64 + 4 * 128 * 64

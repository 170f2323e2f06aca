"""The embedding is split by rows, and its gradient is as large as its part."""

from small_run import VOCAB_SIZE, small_config

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.model import model_blocks


def test_rows_are_padded_and_split() -> None:
    embedding = model_blocks(small_config().model, VOCAB_SIZE).embedding
    assert [shape for _, shape in embedding.weights(2)] == [(128, 64)]
    batch = Microbatch(tokens=10, element_bytes=4, tensor=2, sequence_parallel=False)
    assert embedding.gradient(batch) == 4 * 128 * 64
    assert embedding.kept(batch) == 9 * 10
    assert embedding.backward(batch) == 3 * 4 * 10 * 64 + 4 * 128 * 64

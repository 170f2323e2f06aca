"""The head keeps its logits, and a tied head adds no weight where the embedding is."""

from small_run import PLAIN, TIED, VOCAB_SIZE, small_config

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.model import model_blocks


def test_a_tied_head_has_the_embeddings_weight_where_that_is_not() -> None:
    own, tied = (model_blocks(small_config(model=model).model, VOCAB_SIZE).head for model in (PLAIN, TIED))
    assert [key for key, _ in own.weights(1, holds_embedding=True)][1:] == ["output_layer.weight"]
    assert [key for key, _ in tied.weights(1, holds_embedding=True)][1:] == []
    assert [key for key, _ in tied.weights(1, holds_embedding=False)][1:] == ["embedding.word_embeddings.weight"]


def test_logits_are_kept_once() -> None:
    head = model_blocks(small_config().model, VOCAB_SIZE).head
    batch = Microbatch(tokens=10, element_bytes=2, tensor=1, sequence_parallel=False)
    use = head.use(batch, trained=False)
    assert use.kept == head.norm.kept(batch) + 2 * 10 * 64 + 2 * 10 * 256 + 33 * 10
    assert head.use(batch, trained=True).backward - use.backward == 256 * 64 * 2
    assert head.flops(trained=True) == 6 * 64 * VOCAB_SIZE

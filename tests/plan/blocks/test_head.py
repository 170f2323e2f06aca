"""The head keeps its logits, and a tied head adds no weight where the embedding is."""

from small_run import PLAIN, TIED, VOCAB_SIZE, small_config

from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.resolved import resolve

BATCH = Microbatch(tokens=10, element_bytes=2, tensor=1, sequence_parallel=False)


def test_a_tied_head_has_the_embeddings_weight_where_that_is_not() -> None:
    own, tied = (resolve(small_config(model=model), VOCAB_SIZE).blocks.head for model in (PLAIN, TIED))
    keys = [
        [key for key, _ in head.costs(BATCH, trained=True, holds_embedding=holds_embedding).weights][1:]
        for head, holds_embedding in ((own, True), (tied, True), (tied, False))
    ]
    assert keys == [["output_layer.weight"], [], ["embedding.word_embeddings.weight"]]


def test_logits_are_kept_once() -> None:
    head = resolve(small_config(), VOCAB_SIZE).blocks.head
    frozen, trained = (head.costs(BATCH, trained=trained, holds_embedding=False) for trained in (False, True))
    assert frozen.use.kept == head.norm.costs(BATCH).kept + 2 * 10 * 64 + 2 * 10 * 256 + 33 * 10
    assert trained.use.backward - frozen.use.backward == 256 * 64 * 2
    assert trained.flops == 6 * 64 * VOCAB_SIZE

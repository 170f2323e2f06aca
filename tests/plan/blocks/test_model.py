"""The blocks of a model have its sizes."""

from small_run import TIED, VOCAB_SIZE, small_config

from megatron_step.plan.blocks.model import layer_linears, model_blocks


def test_every_block_has_the_sizes_of_the_config() -> None:
    model = small_config(model={**TIED, "mlp": "gelu"}).model
    blocks = model_blocks(model, VOCAB_SIZE)
    attention, mlp = blocks.layer.attention, blocks.layer.mlp
    assert (attention.heads, attention.groups, attention.head_size, attention.seq_length) == (4, 2, 16, 32)
    assert (attention.qkv_bias, attention.qk_norm) == (True, True)
    assert (mlp.ffn, mlp.gated) == (96, False)
    assert (blocks.embedding.rows, blocks.head.rows, blocks.head.vocab_size) == (256, 256, VOCAB_SIZE)
    assert blocks.head.tied
    assert {block.hidden for block in (attention, mlp, blocks.embedding, blocks.head)} == {64}


def test_linears_are_numbered_in_one_order() -> None:
    """The order seeds the dropout of their adapters."""
    assert list(layer_linears(small_config().model)) == ["qkv", "proj", "fc1", "fc2"]

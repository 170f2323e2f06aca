"""A resolved config has the sizes that follow from vocabulary and world."""

import pytest
from small_run import TIED, VOCAB_SIZE, small_config

from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import RECIPES


def test_sizes_follow_from_vocabulary_and_ranks() -> None:
    config = small_config(
        parallel={"tensor_parallel_size": 2}, training={"precision": "bf16"}, planner={"recipe": "adam8bit"}
    )
    resolved = resolve(config, VOCAB_SIZE, dp_size=2)
    assert (resolved.world_size, resolved.num_microbatches) == (4, 2)
    assert (resolved.blocks.embedding.rows, resolved.blocks.head.vocab_size) == (256, VOCAB_SIZE)
    assert (resolved.batch.tokens, resolved.batch.element_bytes, resolved.batch.tensor) == (2 * 32, 2, 2)
    assert resolved.recipe is RECIPES["adam8bit"]


def test_every_block_has_the_sizes_of_the_config() -> None:
    blocks = resolve(small_config(model={**TIED, "mlp": "gelu"}), VOCAB_SIZE).blocks
    attention, mlp = blocks.layer.attention, blocks.layer.mlp
    assert (attention.heads, attention.groups, attention.head_size, attention.seq_length) == (4, 2, 16, 32)
    assert (attention.qkv_bias, attention.qk_norm) == (True, True)
    assert (mlp.ffn, mlp.gated) == (96, False)
    assert (blocks.embedding.rows, blocks.head.rows, blocks.head.vocab_size) == (256, 256, VOCAB_SIZE)
    assert blocks.head.tied
    assert {block.hidden for block in (attention, mlp, blocks.embedding, blocks.head)} == {64}


def test_the_core_attention_is_the_one_that_the_planner_counts() -> None:
    linear, unfused = (
        resolve(small_config(planner={"attention": attention}), VOCAB_SIZE).core for attention in ("sdpa", "unfused")
    )
    assert (linear.keeps_output, unfused.keeps_output) == (True, False)


def test_another_config_is_resolved_for_the_same_world() -> None:
    resolved = resolve(small_config(), VOCAB_SIZE, dp_size=4)
    changed = resolved.with_config(small_config(parallel={"tensor_parallel_size": 2}))
    assert (changed.world_size, changed.dp_size, changed.vocab_size) == (4, 2, VOCAB_SIZE)
    with pytest.raises(ValueError, match="world of 4 ranks"):
        resolved.with_config(small_config(model={"num_layers": 6}, parallel={"pipeline_parallel_size": 3}))

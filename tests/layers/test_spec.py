"""The block is made of our own layers, and has the checkpoint keys of TransformerEngine's layers."""

import pytest
from small_run import PLAIN, TIED, VOCAB_SIZE, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.layers.attention import SDPAttention
from megatron_step.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_step.layers.norm import RMSNorm
from megatron_step.layers.spec import block_spec
from megatron_step.model.build import build_model, sharded_state


@pytest.mark.parametrize("model", [PLAIN, TIED], ids=["plain", "normed heads and biases"])
def test_every_layer_is_the_products_own(alone: Parallel, model: dict) -> None:
    (chunk,) = build_model(small_config(model=model).model, VOCAB_SIZE, alone, "fp32", seed=1)
    assert len(chunk.decoder.layers) == 4
    for layer in chunk.decoder.layers:
        attention = layer.self_attention
        assert type(attention.linear_qkv) is type(layer.mlp.linear_fc1) is ColumnParallelLinear
        assert type(attention.linear_proj) is type(layer.mlp.linear_fc2) is RowParallelLinear
        assert type(attention.core_attention) is SDPAttention
        assert type(layer.input_layernorm) is type(layer.pre_mlp_layernorm) is RMSNorm
        assert (type(attention.q_layernorm) is RMSNorm) == bool(model.get("qk_norm"))
        assert (attention.linear_qkv.bias is not None) == bool(model.get("qkv_bias"))
    assert type(chunk.decoder.final_layernorm) is RMSNorm


def test_norms_have_the_keys_of_fused_norm_linears(alone: Parallel) -> None:
    (chunk,) = build_model(small_config().model, VOCAB_SIZE, alone, "fp32", seed=1)
    keys = {getattr(shard, "key", "") for shard in sharded_state(chunk, alone).values()}
    assert "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in keys


def test_the_block_has_as_many_layers_as_asked_for() -> None:
    assert len(block_spec(3, False, False).layer_specs) == 3

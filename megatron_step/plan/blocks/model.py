"""The blocks of a model, made from its config: the only file of `plan/blocks` that reads the config."""

from dataclasses import dataclass
from functools import cache

from megatron_step.config.model import ModelConfig
from megatron_step.config.stages import Target
from megatron_step.plan.blocks.attention import Attention
from megatron_step.plan.blocks.embedding import Embedding
from megatron_step.plan.blocks.head import Head
from megatron_step.plan.blocks.layer import Layer
from megatron_step.plan.blocks.linear import Linear
from megatron_step.plan.blocks.mlp import Mlp


@dataclass(frozen=True)
class ModelBlocks:
    """The blocks of a whole model; all its layers are equal."""

    embedding: Embedding
    """The token embedding."""
    layer: Layer
    """One layer."""
    head: Head
    """The final norm, the output layer and the loss."""


def model_blocks(model: ModelConfig, vocab_size: int) -> ModelBlocks:
    """Return the blocks of a model for a tokenizer of `vocab_size` tokens."""
    rows, hidden = model.padded_vocab_size(vocab_size), model.hidden_size
    return ModelBlocks(
        Embedding(rows, hidden), layer_blocks(model), Head(rows, hidden, model.tie_embeddings, vocab_size)
    )


@cache
def layer_blocks(model: ModelConfig) -> Layer:
    """Return a layer of the model."""
    hidden = model.hidden_size
    attention = Attention(
        hidden=hidden,
        heads=model.num_attention_heads,
        groups=model.query_groups,
        head_size=model.attention_head_size,
        seq_length=model.seq_length,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
    )
    return Layer(attention, Mlp(hidden, model.ffn_hidden_size, model.gated_mlp))


def layer_linears(model: ModelConfig) -> dict[Target, Linear]:
    """Return the linears of a layer, in the order that numbers them."""
    return layer_blocks(model).linears()

"""A run's config together with the sizes that depend on the tokenizer and the world.

`resolve` computes the sizes once, when tokenizer and world are known. Planner, training and report then share the
result. `resolve` also makes the blocks of the model (plan/blocks), which hold the sizes of layers, embedding and head.
"""

from dataclasses import dataclass
from functools import cache

from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.plan.blocks.attention import Attention
from megatron_step.plan.blocks.core_attention import CoreAttention
from megatron_step.plan.blocks.embedding import Embedding
from megatron_step.plan.blocks.head import Head
from megatron_step.plan.blocks.layer import Layer
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.mlp import Mlp
from megatron_step.plan.layout import num_microbatches
from megatron_step.plan.states import Recipe, activation_format, recipe_of, weight_format


@dataclass(frozen=True)
class ModelBlocks:
    """The blocks of a whole model, whose layers all have the same sizes."""

    embedding: Embedding
    """The token embedding."""
    layer: Layer
    """One layer."""
    head: Head
    """The final norm, the output layer and the loss."""


@dataclass(frozen=True)
class ResolvedConfig:
    """A config with every size of the run."""

    config: RunConfig
    """The run's config."""
    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    dp_size: int
    """Data-parallel ranks."""
    num_microbatches: int
    """Micro-batches of a rank in a step of a full global batch."""
    batch: Microbatch
    """A micro-batch on a tensor-parallel rank."""
    blocks: ModelBlocks
    """The blocks of the model."""
    core: CoreAttention
    """Bytes of a micro-batch in a layer's core attention."""
    recipe: Recipe
    """The states of the weights, as the planner counts them."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.config.parallel.model_parallel_size * self.dp_size

    def with_config(self, config: RunConfig) -> "ResolvedConfig":
        """Resolve another config for the same tokenizer and world.

        Raises ValueError if the layout of `config` does not fit the world.
        """
        return resolve(config, self.vocab_size, config.parallel.data_parallel_size(self.world_size))


def resolve(config: RunConfig, vocab_size: int, dp_size: int = 1) -> ResolvedConfig:
    """Resolve `config` for a tokenizer of `vocab_size` tokens and `dp_size` data-parallel ranks."""
    training, parallel, planner = config.training, config.parallel, config.planner
    blocks = _model_blocks(config.model, vocab_size)
    batch = Microbatch(
        tokens=training.micro_batch_size * config.model.seq_length,
        element_bytes=activation_format(training.precision).element_bytes,
        widens_weights=weight_format(training.precision) != activation_format(training.precision),
        tensor=parallel.tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )
    core = blocks.layer.attention.core
    keeps_scores, recomputed = planner.attention == "unfused", parallel.recompute == "selective"
    return ResolvedConfig(
        config=config,
        vocab_size=vocab_size,
        dp_size=dp_size,
        num_microbatches=num_microbatches(training, dp_size),
        batch=batch,
        blocks=blocks,
        core=core.unfused(batch, recomputed) if keeps_scores else core.linear(batch),
        recipe=recipe_of(config),
    )


def _model_blocks(model: ModelConfig, vocab_size: int) -> ModelBlocks:
    rows, hidden = model.padded_vocab_size(vocab_size), model.hidden_size
    head = Head(rows, hidden, model.tie_embeddings, vocab_size)
    return ModelBlocks(Embedding(rows, hidden), layer_blocks(model), head)


@cache
def layer_blocks(model: ModelConfig) -> Layer:
    """Return the sizes of a layer of the model. The order of its linears numbers the adapters (adapters/attach.py)."""
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

"""A run's config together with what only the tokenizer and the world decide, and the sizes that follow from them.

`resolve` makes the value once, when both are known; planner, training and report pass it on.
"""

from dataclasses import dataclass

from megatron_step.config.run import RunConfig
from megatron_step.plan.blocks.core_attention import CoreAttention
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.model import ModelBlocks, model_blocks
from megatron_step.plan.layout import num_microbatches
from megatron_step.plan.states import Recipe, recipe_of, weight_format


@dataclass(frozen=True)
class ResolvedConfig:
    """A config with every size of its run."""

    config: RunConfig
    """What the user wrote."""
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
    blocks = model_blocks(config.model, vocab_size)
    batch = Microbatch(
        tokens=training.micro_batch_size * config.model.seq_length,
        element_bytes=weight_format(training.precision).element_bytes,
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

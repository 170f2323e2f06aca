"""The decoder-only language model: megatron-core's GPTModel with our own rotary embedding and loss."""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.gpt import gpt_model
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_step import ops
from megatron_step.config.model import ModelConfig
from megatron_step.engine.compat.models import computes_outputs
from megatron_step.engine.device import current_device
from megatron_step.layers.embedding import widen_embedding
from megatron_step.layers.rotary import RotaryEmbedding, ScaledRotaryEmbedding


@computes_outputs
class GPTModel(gpt_model.GPTModel):
    """A pipeline rank's chunk of the model, from token ids or hidden states to hidden states, logits or losses."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        groups: ProcessGroupCollection,
        vocab_size: int,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=model.padded_vocab_size(vocab_size),
            max_sequence_length=model.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        # TransformerEngine's modules take angles; ours take cosines and sines.
        rotary = ScaledRotaryEmbedding if config.apply_rope_fusion else RotaryEmbedding
        self.rotary_pos_emb = rotary(model, current_device(), groups.cp)
        self.true_vocab_size = vocab_size
        if pre_process and config.params_dtype != config.pipeline_dtype:
            widen_embedding(self.embedding.word_embeddings, config.pipeline_dtype)

    def outputs(self, hidden_states: Tensor, labels: Tensor | None, **unused: Any) -> Tensor:
        """Compute losses [b, s] of hidden_states [s, b, h] and labels [b, s]; without labels, logits [b, s, v / t]."""
        if not self.post_process:
            return hidden_states
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight  # [v / t, h]
        group = self.pg_collection.tp
        # Each rank's gradient covers its shard of the vocabulary; these functions sum it over ranks in backward.
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=group)
        if labels is None:
            return ops.linear(hidden_states, weight).transpose(0, 1)
        losses = ops.linear_cross_entropy(
            hidden_states,
            weight,
            labels.transpose(0, 1),
            vocab_size=self.true_vocab_size,
            vocab_start=group.rank() * weight.shape[0],
            group=group if group.size() > 1 else None,
        )
        return losses.transpose(0, 1)

"""Causal self-attention with rotary embedding, on scaled_dot_product_attention."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_step import ops


class SDPAttention(torch.nn.Module):
    """Core attention softmax(q k^T / sqrt(d)) v with a causal mask, without a score matrix.

    Raises ValueError for a mask that is not causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"SDPAttention supports the causal mask only, not {attn_mask_type}")
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n d]."""
        return ops.attention(query, key, value, self.softmax_scale)


class SelfAttention(megatron_attention.SelfAttention):
    """megatron-core's SelfAttention with our operations: one to split and rotate q, k and v, one for attention."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Tensor, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: hidden_states [s, b, h], rotary_pos_emb [2, s, d] (cosine, sine) -> output [s, b, h] and its bias."""
        query, key, value = self._query_key_value(hidden_states, rotary_pos_emb)
        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(self.core_attention, False, query, key, value)
        else:
            context = self.core_attention(query, key, value)
        return self.linear_proj(context)

    def _query_key_value(self, hidden_states: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and rotate: hidden_states [s, b, h] -> query [s, b, n, d], key and value [s, b, g, d]."""
        cosine, sine = rotary[0], rotary[1]
        if self.q_layernorm is None:
            qkv, _ = self.linear_qkv(hidden_states)  # [s, b, g (n / g + 2) d]
            return ops.split_qkv_rotary(
                qkv,
                cosine,
                sine,
                num_attention_heads=self.num_attention_heads_per_partition,
                num_query_groups=self.num_query_groups_per_partition,
            )
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        return ops.rotary(query, cosine, sine), ops.rotary(key, cosine, sine), value

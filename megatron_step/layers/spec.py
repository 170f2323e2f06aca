"""Specs of transformer layers for megatron-core's TransformerBlock: the modules that a layer is made of."""

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_step.layers.attention import SDPAttention, SelfAttention
from megatron_step.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_step.layers.mlp import MLP
from megatron_step.layers.norm import RMSNorm
from megatron_step.plan.names import ATTENTION_NORM, MLP_NORM


def local_layer_spec(qk_norm: bool) -> ModuleSpec:
    """Return the spec of a layer made of our own modules, for any device."""
    head_norm = RMSNorm if qk_norm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SDPAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=MLP,
            mlp_bda=get_bias_dropout_add,
            # Checkpoints use the names of TransformerEngine's fused norm-linears.
            sharded_state_dict_keys_map={
                "input_layernorm.": ATTENTION_NORM.removesuffix("weight"),
                "pre_mlp_layernorm.": MLP_NORM.removesuffix("weight"),
            },
        ),
    )


def block_spec(num_layers: int, qk_norm: bool, transformer_engine: bool) -> TransformerBlockSubmodules:
    """Return the spec of `num_layers` layers and the final norm, from our modules or from TransformerEngine's."""
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TESpecProvider().layer_norm())
    return TransformerBlockSubmodules(layer_specs=[local_layer_spec(qk_norm)] * num_layers, layer_norm=RMSNorm)

"""megatron-core's TransformerConfig for a model under a parallel layout."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_step.config.model import ModelConfig
from megatron_step.config.parallel import ParallelConfig
from megatron_step.engine.formats import tensor_type
from megatron_step.plan.states import activation_format, weight_format

_ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu}


def transformer_config(
    model: ModelConfig, layout: Sequence[int], parallel: ParallelConfig, precision: str, transformer_engine: bool
) -> TransformerConfig:
    """Make megatron-core's config that builds and runs `model`, with TransformerEngine's modules or without.

    `layout` gives the number of layers in every chunk of the pipeline, in layer order.
    """
    weights, activations = tensor_type(weight_format(precision)), tensor_type(activation_format(precision))
    return TransformerConfig(
        # Shape
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.attention_head_size,
        # Architecture
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.gated_mlp,
        activation_func=_ACTIVATIONS[model.mlp],
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Numbers
        params_dtype=weights,
        pipeline_dtype=activations,
        bf16=activations is torch.bfloat16,
        # initialize.py fills the weights; megatron-core only marks how they are split.
        init_method=_leave_unfilled,
        output_layer_init_method=_leave_unfilled,
        # Without TransformerEngine our operations replace megatron-core's fusions.
        gradient_accumulation_fusion=transformer_engine,
        bias_activation_fusion=transformer_engine,
        apply_rope_fusion=transformer_engine,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        **_parallel_fields(parallel),
        pipeline_model_parallel_layout=_layers_of_chunks(layout) if len(layout) > 1 else None,
        **_recompute_fields(parallel),
    )


def _leave_unfilled(weight: torch.Tensor) -> None:
    """Leave the weight as it is."""


def _parallel_fields(parallel: ParallelConfig) -> dict[str, object]:
    interleaved = parallel.virtual_pipeline_size > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_size if interleaved else None,
        "sequence_parallel": parallel.sequence_parallel,
        # With two interleaved pipeline ranks, the previous rank is also the next one. gloo would then swap batched
        # messages of equal size, without an error.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # CUDA streams order the send before the free; a gloo send would still read the freed output.
        "deallocate_pipeline_outputs": torch.cuda.is_available(),
    }


def _layers_of_chunks(layout: Sequence[int]) -> list[list[str]]:
    """Return the blocks of each chunk by megatron-core's names."""
    chunks = [["decoder"] * num_layers for num_layers in layout]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _recompute_fields(parallel: ParallelConfig) -> dict[str, object]:
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}

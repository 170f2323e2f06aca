"""megatron-core is told the model, the layout, and what is known to go wrong without CUDA."""

import pytest
import torch
from small_run import TIED, small_config

from megatron_step.model.transformer_config import transformer_config
from megatron_step.plan.stages import even_layout


def _config(model: dict | None = None, precision: str = "fp32", **parallel: object) -> object:
    config = small_config(model=model, parallel=parallel)
    layout = even_layout(4, config.parallel.pipeline_parallel_size * config.parallel.virtual_pipeline_size)
    return transformer_config(config.model, layout, config.parallel, precision, False)


def test_the_shape_is_the_models() -> None:
    config = _config(TIED, "bf16")
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 96)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 16)
    assert config.gated_linear_unit
    assert config.qk_layernorm
    assert config.add_qkv_bias
    assert not config.add_bias_linear
    assert config.params_dtype is torch.bfloat16
    assert config.bf16


def test_two_interleaved_pipeline_ranks_do_not_batch_their_messages() -> None:
    config = _config(pipeline_parallel_size=2, virtual_pipeline_size=2)
    assert not config.batch_p2p_comm
    assert config.overlap_p2p_comm
    plain = _config(pipeline_parallel_size=2)
    assert plain.batch_p2p_comm
    assert plain.virtual_pipeline_model_parallel_size is None


@pytest.mark.parametrize(
    ("recompute", "granularity", "modules"),
    [("none", None, None), ("full", "full", None), ("selective", "selective", ["core_attn"])],
)
def test_what_is_computed_again(recompute: str, granularity: str | None, modules: list[str] | None) -> None:
    config = _config(recompute=recompute)
    assert config.recompute_granularity == granularity
    if modules:
        assert config.recompute_modules == modules
    if granularity == "full":
        assert (config.recompute_method, config.recompute_num_layers) == ("uniform", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with streams an output may be freed once it is sent")
def test_a_sent_output_is_kept_without_cuda() -> None:
    assert not _config(pipeline_parallel_size=2).deallocate_pipeline_outputs


def test_the_layout_may_be_uneven() -> None:
    config = small_config(parallel={"pipeline_parallel_size": 2})
    built = transformer_config(config.model, (1, 3), config.parallel, "fp32", False)
    layout = [
        [str(getattr(part, "name", part)) for part in rank[0]] for rank in built.pipeline_model_parallel_layout.layout
    ]
    assert layout == [["embedding", "decoder"], ["decoder", "decoder", "decoder", "loss"]]
    assert (
        transformer_config(config.model, (4,), small_config().parallel, "fp32", False).pipeline_model_parallel_layout
        is None
    )

"""The model section knows which sizes go together."""

import pytest

from megatron_step.config.model import ModelConfig, RopeScalingConfig

_SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "model.num_layers must be at least 1"),
        ({"num_attention_heads": 3}, "hidden_size 64 is not divisible by model.num_attention_heads 3"),
        ({"num_query_groups": 3}, "num_attention_heads 4 is not divisible by model.num_query_groups 3"),
        ({"num_query_groups": 0}, "num_query_groups 0"),
        ({"num_query_groups": -1}, "num_query_groups -1: set model.num_query_groups to 1"),
        ({"num_attention_heads": -4}, "num_attention_heads must be at least 1"),
        ({"head_size": 15}, "must be even"),
        ({"vocab_size": 1}, "model.vocab_size must be at least 2"),
        ({"norm_epsilon": 0.0}, "must be positive"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**_SIZES, **fields})


@pytest.mark.parametrize(
    "fields",
    [{"factor": 0.5}, {"low_freq_factor": 4.0}, {"original_max_position": 0}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_rope_scaling_that_cannot_be_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="rope_scaling"):
        RopeScalingConfig(**fields)


def test_what_is_left_out_follows_from_the_rest() -> None:
    model = ModelConfig(**_SIZES)
    assert (model.query_groups, model.attention_head_size) == (4, 16)
    assert ModelConfig(**_SIZES, head_size=32).attention_head_size == 32


def test_the_vocabulary_is_padded_upwards_to_a_multiple() -> None:
    model = ModelConfig(**_SIZES)
    assert [model.padded_vocab_size(size) for size in (1, 128, 129)] == [128, 128, 256]

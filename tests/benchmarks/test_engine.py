import pytest

from benchmarks import engine
from megatron_step.config.model import ModelConfig

TINY = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, seq_length=16, vocab_size=128
)


def test_both_ways_train_alike_and_are_timed():
    # The run itself raises where the losses differ in any digit.
    hook, shim = engine.run(1, TINY, steps=3)
    assert (hook["way"], shim["way"]) == (engine.HOOK, engine.SHIM)
    assert hook["of_the_hook"] == 1.0
    assert shim["of_the_hook"] == pytest.approx(shim["milliseconds"] / hook["milliseconds"])
    for row in (hook, shim):
        assert 0 < row["p10"] <= row["milliseconds"] <= row["p90"]
        assert row["start_seconds"] > 0


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        engine.run(0, TINY)

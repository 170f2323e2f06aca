import time

import pytest

from benchmarks import loop
from megatron_step.config.model import ModelConfig
from megatron_step.training import stage
from megatron_step.training.step import train_step

TINY = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, seq_length=16, vocab_size=512
)


def test_the_loop_is_measured_beside_the_step():
    large, small = loop.run(1, TINY, 2, TINY)
    assert (large["steps"], small["steps"]) == (1, 20)
    for row in (large, small):
        assert 0 < row["p10"] <= row["loop_milliseconds"] <= row["p90"]
        assert row["step_milliseconds"] > 0
        assert 0 < row["share"] < 1
    assert stage.train_step is train_step  # as it was


def test_what_the_loop_does_between_steps_counts(monkeypatch):
    # The loop asks twice a step how many samples it has come to.
    monkeypatch.setattr(stage, "consumed_samples", lambda training, steps: time.sleep(0.01) or steps)
    row = loop.run(1, TINY, 2, TINY)[1]
    assert row["loop_milliseconds"] >= 20


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        loop.run(0, TINY)

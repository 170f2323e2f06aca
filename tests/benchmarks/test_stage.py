import pytest

from benchmarks import stage
from megatron_step.config.model import ModelConfig

TINY = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, seq_length=16, vocab_size=128
)


def test_each_arm_stands_beside_vanilla_and_its_arithmetic() -> None:
    rows = stage.run(1, TINY, micro_batch_size=2, rank=4, precisions=["fp32"])
    vanilla, adapted, frozen = rows
    assert [row["arm"] for row in rows] == ["vanilla step", "last stage", "last stage without adapters"]
    assert vanilla["time_of_vanilla"] == vanilla["operations_of_vanilla"] == 1.0
    assert frozen["operations_of_vanilla"] < adapted["operations_of_vanilla"] < 1.0
    assert adapted["time_of_vanilla"] == pytest.approx(adapted["seconds"] / vanilla["seconds"])
    assert adapted["time_without_adapters"] == pytest.approx(adapted["seconds"] / frozen["seconds"])

from benchmarks import optimizer
from megatron_step.config.model import ModelConfig

SMALL = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, seq_length=16, vocab_size=256
)


def test_every_arm_is_measured_against_torch() -> None:
    rows = optimizer.run(2, SMALL)
    arms = [row["arm"] for row in rows]
    assert arms.count("torch fused AdamW, fp32") == 2
    assert len(rows) == 2 + len(optimizer.ADAMW) + len(optimizer.MUON)
    assert all(row["over_torch"] == 1.0 for row in rows if row["arm"].startswith("torch"))
    assert all(row["milliseconds"] > 0 for row in rows)

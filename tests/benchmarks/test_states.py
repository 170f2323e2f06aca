from benchmarks import states
from megatron_step.config.model import ModelConfig

TINY = ModelConfig(
    num_layers=6, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, seq_length=16, vocab_size=128
)


def test_what_is_built_is_what_was_planned() -> None:
    rows = states.run(TINY, rank=4, count=3)
    assert [row["stage"] for row in rows] == ["vanilla", "1", "2", "3"]
    assert all(row["measured_mib"] == row["planned_mib"] for row in rows)
    assert rows[0]["share_of_vanilla"] == 1.0
    assert all(row["share_of_vanilla"] < 0.8 for row in rows[1:])
    assert all(abs(row["share_of_vanilla"] - row["share_by_paper_recipe"]) < 0.1 for row in rows)

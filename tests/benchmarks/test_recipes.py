from benchmarks import recipes
from megatron_step.config.model import ModelConfig

SMALL = ModelConfig(
    num_layers=2, hidden_size=128, ffn_hidden_size=342, num_attention_heads=4, seq_length=16, vocab_size=512
)


def test_every_recipe_takes_the_planned_bytes() -> None:
    rows = recipes.run(SMALL)
    assert len(rows) == 2 * len(recipes.RECIPES)
    assert all(abs(row["planned_above_percent"]) < 0.5 for row in rows), rows
    one = {row["recipe"]: row["measured"] for row in rows if row["ranks"] == 1}
    assert one["full"] > one["exact"] > one["exact gradients bf16"] > one["compact"] > one["smallest"]
    assert one["compact"] - one["compact correction_bits 8"] > 0.9
    assert one["compact"] > one["compact rule muon"] > one["compact correction_bits 8 rule muon"]

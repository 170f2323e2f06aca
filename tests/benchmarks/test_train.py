import pytest

from benchmarks import train
from benchmarks.configs import SMALL_MODEL
from megatron_step.config.model import ModelConfig

TINY = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, seq_length=16, vocab_size=128
)


@pytest.fixture(scope="module")
def rows():
    return train.run(1, TINY, micro_batch_size=2, precisions=["fp32"])


def test_every_arm_has_its_speed(rows):
    arms = {row["arm"]: row for row in rows if "tokens_per_second" in row}
    assert list(arms) == [
        "megatron_step",
        "megatron-core, local layers",
        "megatron-core, freed memory kept",
        "transformers Llama, SDPA",
    ]
    assert arms["megatron_step"]["megatron_step_is_faster_by"] == 1.0
    ours = arms["megatron_step"]["tokens_per_second"]
    for row in arms.values():
        assert row["tokens_per_second"] > 0
        assert row["megatron_step_is_faster_by"] == pytest.approx(ours / row["tokens_per_second"])


def test_the_step_is_set_against_its_products(rows):
    arms = {row["arm"]: row for row in rows if "share_of_step" in row}
    assert list(arms) == ["whole step", "matrix products alone", "the same by torch.mm"]
    for row in arms.values():
        assert row["share_of_step"] == pytest.approx(row["seconds"] / arms["whole step"]["seconds"])
    assert sum(row["share"] for row in rows if "share" in row) == pytest.approx(1.0)


def test_arms_of_different_models_are_refused():
    with pytest.raises(RuntimeError, match=r"other starts with loss 2\.0, but megatron_step with 1\.0"):
        train.check_same_loss({"megatron_step": lambda: 1.0, "other": lambda: 2.0})
    train.check_same_loss({"megatron_step": lambda: 1.0, "other": lambda: 1.0001})


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        train.run(0, SMALL_MODEL, micro_batch_size=1, precisions=["fp32"])

import pytest
import torch

from benchmarks import ops

SMALL = ops.Sizes(
    seq_length=8, micro_batch_size=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, vocab_size=40
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_arms_compute_the_same(dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for case in ops.cases(SMALL, dtype):
        for ours, theirs in zip(case.ours(*case.inputs), case.torch(*case.inputs)):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def test_rows_hold_both_arms_of_every_operation():
    rows = ops.run(2, SMALL)
    names = [case.name for case in ops.cases(SMALL, torch.float32)]
    assert len(rows) == len(names) * 2 * 2 * 2  # precisions, directions, arms
    for row in rows:
        assert 0 < row["p10"] <= row["milliseconds"] <= row["p90"]
        assert row["arm"] != "torch" or row["speedup"] == 1.0


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        ops.run(0, SMALL)

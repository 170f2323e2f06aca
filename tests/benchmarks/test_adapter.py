import pytest
import torch

from benchmarks import adapter

CPU = torch.device("cpu")


def test_all_arms_compute_the_same_without_dropout():
    torch.manual_seed(0)
    linears, x = adapter._linears(24, 4, torch.float32, CPU), torch.randn(6, 24)
    torch.testing.assert_close(linears["megatron_step"](x), linears["plain torch"](x))
    assert not torch.allclose(linears["megatron_step"](x), linears["frozen linear"](x))
    assert not torch.allclose(linears["megatron_step, dropout"](x), linears["megatron_step"](x))


def test_kept_bytes_are_those_of_x_and_u():
    linears, x = adapter._linears(24, 4, torch.float32, CPU), torch.randn(6, 24, requires_grad=True)
    x_bytes, u_bytes = 6 * 24 * 4, 6 * 4 * 4
    assert adapter.kept_bytes(linears["frozen linear"], x) == 0
    assert adapter.kept_bytes(linears["megatron_step"], x) == x_bytes + u_bytes
    assert adapter.kept_bytes(linears["megatron_step, dropout"], x) == x_bytes + u_bytes
    assert adapter.kept_bytes(linears["plain torch"], x) == x_bytes + u_bytes
    # Plain dropout keeps what it has dropped from, or the mask and the result.
    assert adapter.kept_bytes(linears["plain torch, dropout"], x) > x_bytes + u_bytes


def test_rows_hold_every_arm_and_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    rows = adapter.run(2, adapter.Setting(CPU, 8, (16,), (2, 4)))
    assert torch.get_num_threads() == before
    arms = len(adapter._linears(16, 2, torch.float32, CPU))
    assert len(rows) == 2 * 2 * arms  # precisions, ranks
    for row in rows:
        assert 0 < row["p10"] <= row["over_frozen"] <= row["p90"]
        assert row["floor"] == (1 if row["arm"] == "frozen linear" else 1 + 3 * row["rank"] / 16)
        assert row["arm"] != "frozen linear" or row["over_frozen"] == 1


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        adapter.run(0, adapter.Setting(CPU, 8, (16,), (2,)))

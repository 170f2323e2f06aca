import re
from pathlib import Path

import pytest

from benchmarks import kernels
from megatron_step.ops import dispatch


def test_kernels_move_each_activation_once():
    sizes = kernels.Sizes(tokens=8192, hidden_size=4096, rank=16)
    for kernel in kernels.work(sizes):
        assert kernel.wide_bytes == 2 * 8192 * 4096
        assert kernel.narrow_bytes < kernel.wide_bytes
    assert sizes.frozen_flops == 2 * 2 * 8192 * 4096 * 4096


def test_sums_are_cut_as_the_kernels_cut_them():
    """Compute the partial sums by the constants of csrc/adapter_kernels.h, which only C++ can read."""
    header = (Path(__file__).parents[2] / "csrc/adapter_kernels.h").read_text()
    assert re.search(r"kTile = 64;", header)
    assert re.search(r"wanted_blocks = 512, shortest = 4 \* kTile;", header)
    assert [kernels._parts(4096, 128), kernels._parts(8192, 64), kernels._parts(8192, 16)] == [4, 8, 32]
    assert [kernels._parts(1, 1), kernels._parts(257, 1), kernels._parts(4096, 600)] == [1, 2, 1]


def test_dropout_costs_what_its_mask_takes():
    (without, *_), (with_dropout, *_) = (
        [kernel.seconds(dropout) for kernel in kernels.work(kernels.Sizes())] for dropout in (False, True)
    )
    assert without == pytest.approx((2 * 8192 * 4096 + 2 * 4096 * 16 + 2 * 4 * 4 * 8192 * 16) / 2.8e12)
    assert with_dropout == pytest.approx(8192 * 4096 / 9e11)


def test_rows_end_with_the_whole_linear():
    rows = kernels.run(1)
    for dropout in ("no", "yes"):
        *single, frozen, whole = [row for row in rows if row.get("dropout") == dropout]
        assert frozen["of_frozen"] == 1
        assert whole["of_frozen"] == pytest.approx(1 + sum(row["of_frozen"] for row in single))


@pytest.mark.skipif(not dispatch.cuda_extension_available(), reason="the CUDA kernels are not built")
def test_every_kernel_is_timed_on_a_gpu():
    measured = [row for row in kernels.run(2, kernels.Sizes(64, 128, 8)) if "p10" in row]
    assert {row["kernel"] for row in measured} > {kernel.name for kernel in kernels.work(kernels.Sizes())}
    assert all(0 < row["p10"] <= row["microseconds"] for row in measured)

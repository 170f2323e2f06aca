"""The emulation does what a GPU does, and shows the faults that it is there to show."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from emulation.build import emulation_works, library_of

pytestmark = pytest.mark.skipif(not emulation_works(), reason="the emulation needs g++ on x86-64")


@pytest.fixture(scope="module")
def probes() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(str(library_of(Path(__file__).with_name("probes.cu"))))
    yield library
    library.set_order(0)


@pytest.fixture
def probe(probes: ctypes.CDLL) -> Callable[..., str | None]:
    """Runs a probe with tensors and numbers; returns the error, if any."""

    def run(name: str, *arguments: torch.Tensor | int) -> str | None:
        function = getattr(probes, f"probe_{name}")
        function.restype = ctypes.c_char_p
        converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        error = function(*converted)
        return None if error is None else error.decode()

    return run


def layout(shape, stride):
    """Offsets of a CuTe layout's coordinates; the first index changes fastest."""
    places = torch.zeros(1, dtype=torch.long)
    for size, step in zip(shape, stride):
        places = (places.unsqueeze(0) + torch.arange(size).unsqueeze(1) * step).flatten()
    return places


def interleaved(thread, value):
    """[32, values] from a CuTe layout of threads and one of values."""
    return layout(*thread).unsqueeze(1) + layout(*value).unsqueeze(0)


# CUTLASS, include/cute/atom/mma_traits_sm80.hpp, MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>: for thread and value, the
# place in A [m, k], B [n, k] and C [m, n] laid out with the first index running fastest.
A_PLACES = interleaved(((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)))
B_PLACES = interleaved(((4, 8), (16, 1)), ((2, 2), (8, 64)))
C_PLACES = interleaved(((4, 8), (32, 1)), ((2, 2), (16, 8)))


def test_layouts_are_those_of_whole_matrices():
    for places, elements in ((A_PLACES, 16 * 16), (B_PLACES, 8 * 16), (C_PLACES, 16 * 8)):
        assert sorted(places.flatten().tolist()) == list(range(elements))


def test_a_matrix_product_holds_its_operands_where_cutlass_says(probe):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()  # [m, k], [n, k]
    a_words, b_words = (
        matrix.t().flatten()[places].contiguous().view(torch.int32) for matrix, places in ((a, A_PLACES), (b, B_PLACES))
    )
    held = torch.empty(32, 4)
    assert probe("multiply", a_words, b_words, held) is None
    c = torch.empty(16 * 8)
    c[C_PLACES.flatten()] = held.flatten()
    torch.testing.assert_close(c.view(8, 16).t(), a.float() @ b.float().t())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_load_gives_lanes_the_elements_that_ptx_says(probe, transposed):
    words = torch.empty(32, 4, dtype=torch.int32)
    assert probe("load", words, transposed) is None
    got = words.view(torch.int16).view(32, 4, 2)  # lane, matrix, element
    for lane in range(32):
        for matrix in range(4):
            for element in range(2):
                # PTX ISA, ldmatrix: row lane / 4, columns 2 (lane % 4) and the next; with .trans of the transpose.
                row, column = lane // 4, 2 * (lane % 4) + element
                if transposed:
                    row, column = column, row
                assert got[lane, matrix, element] == 8 * (8 * matrix + row) + column


def test_shared_memory_is_nan_until_written_and_copies_are_not_there_until_waited_for(probe):
    source, seen = torch.arange(1.0, 9.0), torch.zeros(6)
    assert source.data_ptr() % 16 == 0
    assert probe("copy", source, seen) is None
    poison, early, first, beyond, second, last = seen.tolist()
    assert poison != poison
    assert early != early
    assert (first, beyond) == (2.0, 0.0)
    assert second != second
    assert last == 4.0


def test_a_copy_from_an_address_that_no_gpu_takes_is_an_error(probe):
    assert "multiples of 16" in probe("copy", torch.arange(9.0)[1:], torch.zeros(6))


def test_a_barrier_that_part_of_a_block_skips_is_an_error(probe):
    assert "64 of 128 threads wait at a barrier" in probe("skip_barrier")


def test_a_collective_that_a_lane_skips_is_an_error(probe):
    assert "0 of 32 threads wait at a barrier" in probe("skip_collective")


def test_orders_differ_and_all_threads_run(probes, probe):
    orders = []
    for order in range(3):
        probes.set_order(order)
        seen, visits = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        assert probe("threads", seen, visits, 128) is None
        orders.append(seen.tolist())
    assert orders[0] == list(range(128))
    assert orders[1] == orders[0][::-1]
    assert sorted(orders[2]) == orders[0] != orders[2]


def test_a_launch_that_a_gpu_would_refuse_is_an_error(probe):
    seen, visits = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert "every GPU would refuse" in probe("threads", seen, visits, 33)

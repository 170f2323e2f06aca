import os
import platform
import resource
import sys
from pathlib import Path

import pytest
import torch

from megatron_step.engine.host_memory import keep_freed_memory, left_out_of_forks

KEPT_MIB = (40, 70, 33, 56)
BEYOND_ALL_KEPT_MIB = (512,)  # finds no room among freed blocks, which small objects may hold in the heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this switch")


def share_given_back(sizes: tuple[int, ...]) -> float:
    """Share of memory that the process returns when tensors of these sizes (MiB) are freed."""
    tensors = [torch.ones(mib * 2**20, dtype=torch.uint8) for mib in sizes]
    total, resident = sum(tensor.nbytes for tensor in tensors), resident_bytes()
    del tensors
    return (resident - resident_bytes()) / total


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_within_the_block_freed_memory_stays():
    with keep_freed_memory():
        assert share_given_back(KEPT_MIB) < 0.1


def test_after_the_block_it_goes_back():
    with keep_freed_memory():
        share_given_back(KEPT_MIB)
    for _ in range(3):
        assert share_given_back(BEYOND_ALL_KEPT_MIB) > 0.9


def sum_in_a_fork(tensor: torch.Tensor) -> int:
    """Sum of a small tensor of bytes as a forked process sees it."""
    child = os.fork()
    if child == 0:
        os._exit(int(tensor.numpy().sum()) % 251)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this switch")
@pytest.mark.parametrize("mib", [1, 64])
def test_a_fork_sees_zeros_within_the_block_alone(mib: int) -> None:
    """1 MiB lies in the heap, and 64 MiB in separately mapped pages. The first and the last page may be seen."""
    tensor = torch.zeros(mib << 20, dtype=torch.uint8)
    tensor[tensor.numel() // 2] = 7
    with left_out_of_forks([tensor, torch.ones(3), torch.empty(0)]):
        assert sum_in_a_fork(tensor) == 0
        assert int(tensor.sum()) == 7
    assert sum_in_a_fork(tensor) == 7

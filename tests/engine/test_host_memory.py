import platform
import resource
from pathlib import Path

import pytest
import torch

from megatron_step.engine.host_memory import keep_freed_memory

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

import ctypes
import platform
import resource

import pytest
import torch

from megatron_step.engine.host_memory import keep_freed_memory

MIBS = (40, 70, 33, 56)

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this switch")


def share_taken_anew() -> float:
    """Of the pages of a few large tensors, those that the system hands out anew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(mib * 2**20, dtype=torch.uint8) for mib in MIBS]
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages * resource.getpagesize() / sum(tensor.nbytes for tensor in tensors)


def test_kept_memory_is_used_again():
    with keep_freed_memory():
        share_taken_anew()
        assert share_taken_anew() < 0.5


def test_after_the_block_it_goes_back():
    with keep_freed_memory():
        share_taken_anew()
    ctypes.CDLL(None).malloc_trim(0)  # else the tensors find room in what was kept
    for _ in range(3):
        assert share_taken_anew() > 0.5

import ctypes
import platform
import resource

import pytest
import torch

from megatron_step.engine.host_memory import keep_freed_memory, return_freed_memory

BYTES = 256 * 2**20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this switch")


@pytest.fixture(autouse=True)
def leave_it_as_it_was():
    yield
    return_freed_memory()
    ctypes.CDLL(None).malloc_trim(0)


def pages_taken_anew() -> int:
    """Pages that the system hands out for one more large tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_kept_memory_is_used_again():
    keep_freed_memory()
    pages_taken_anew()
    assert pages_taken_anew() < 100


def test_returned_memory_is_taken_anew():
    keep_freed_memory()
    return_freed_memory()
    pages_taken_anew()
    assert pages_taken_anew() * resource.getpagesize() > 0.9 * BYTES

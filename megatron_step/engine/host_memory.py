"""Keep the memory that CPU tensors free in the process, instead of returning it to the system.

A training step allocates and frees the same large tensors many times. glibc returns blocks above 32 MiB, and the end of
its heap, to the system, which clears every page before the process gets it again. CUDA's caching allocator also keeps
freed memory. Other C libraries lack glibc's switch (mallopt); with them this file does nothing.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)
_MIB = 2**20


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory for the next allocation within the block; afterwards, return freed memory as usual."""
    _set(_MMAP_MAX, 0)  # no separately mapped blocks: free() would return them
    _set(_TRIM_THRESHOLD, -1)  # never shorten the heap
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, 32 * _MIB)
        _set(_MMAP_MAX, 65536)
        _set(_TRIM_THRESHOLD, 64 * _MIB)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)

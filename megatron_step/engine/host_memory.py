"""What becomes of memory that tensors on the CPU free: the process keeps it, or the system takes it back.

A training step allocates and frees the same large tensors again and again. glibc returns blocks of more than 32 MiB as
they are freed, and the end of its heap too, and the system clears every page before it hands it out
again. CUDA's caching allocator keeps memory, too. Other C libraries have no such switch; there nothing happens.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)
_MIB = 2**20


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Within the block, freed memory stays for the next allocation; after it, what is freed goes back as usual."""
    _set(_MMAP_MAX, 0)  # no separately mapped block, which would be returned
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

"""What becomes of the host's memory when CPU tensors are freed, and when the process is forked.

A training step allocates and frees the same large tensors many times. glibc returns blocks above 32 MiB, and the end of
its heap, to the system, which clears every page before the process gets it again. CUDA's caching allocator also keeps
freed memory. Other C libraries lack glibc's switches, and other systems those of Linux; there this file does nothing.
"""

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)
_WIPE_ON_FORK, _KEEP_ON_FORK = 18, 19  # madvise(2)
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


@contextmanager
def left_out_of_forks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Leave the CPU tensors' memory, and freed memory, out of the processes that this one forks within the block.

    A forked process shares all memory with this one, and keeps each page that this one changes later. In the fork, the
    tensors hold zeros.
    """
    places = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.device.type == "cpu"]
    _call("malloc_trim", ctypes.c_size_t(0))  # return freed memory to the system
    _advise(places, _WIPE_ON_FORK)
    try:
        yield
    finally:
        _advise(places, _KEEP_ON_FORK)


def _advise(places: Iterable[tuple[int, int]], advice: int) -> None:
    """Give the system advice about the whole pages of each place: an address and a number of bytes."""
    page = mmap.PAGESIZE
    for address, nbytes in places:
        first, last = -(-address // page) * page, (address + nbytes) // page * page
        if first < last:
            _call("madvise", ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice))


def _set(parameter: int, value: int) -> None:
    _call("mallopt", ctypes.c_int(parameter), ctypes.c_int(value))


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library, if it has that function."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)

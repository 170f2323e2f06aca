"""Replacement of `torch.cuda` for megatron-core on machines without CUDA: one CPU "device" without streams.

Names that this file lacks come from torch.cuda itself, which raises a clear error when they are used.
"""

from contextlib import nullcontext
from typing import Any

import torch


def is_available() -> bool:
    """Return False: there is no CUDA device."""
    return False


def current_device() -> torch.device:
    """Return the device on which megatron-core makes its tensors."""
    return torch.device("cpu")


def synchronize(device: Any = None) -> None:
    """Do nothing: CPU operations are complete when they return."""


def empty_cache() -> None:
    """Do nothing: the CPU allocator has no cache."""


class Stream:
    """A stream whose work is always complete, since CPU operations run at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...


def current_stream(device: Any = None) -> Stream:
    """Return the current stream."""
    return Stream()


def default_stream(device: Any = None) -> Stream:
    """Return the default stream."""
    return Stream()


def stream(stream: Stream | None) -> nullcontext[None]:
    """Return a context in which `stream` is the current one."""
    return nullcontext()


def device(device: Any) -> nullcontext[None]:
    """Return a context in which `device` is the current one."""
    return nullcontext()


# Random numbers: the "device's" generator is the CPU's.
class _IndexedGenerators(list[torch.Generator]):
    """`default_generators[index]` for any index that megatron-core takes from `current_device()`."""

    def __getitem__(self, index: Any) -> Any:
        return torch.default_generator


default_generators = _IndexedGenerators()


def manual_seed(seed: int) -> None:
    """Seed the CPU generator."""
    torch.manual_seed(seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    """Return the state of the CPU generator."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    """Set the state of the CPU generator."""
    torch.set_rng_state(new_state)


class random:
    """Replacement of `torch.cuda.random`."""

    get_rng_state = staticmethod(get_rng_state)
    set_rng_state = staticmethod(set_rng_state)


def _lazy_init() -> None:
    """Do nothing: there is no device to initialise."""


def _lazy_call(function: Any, **kwargs: Any) -> None:
    function()


def __getattr__(name: str) -> Any:
    return getattr(torch.cuda, name)

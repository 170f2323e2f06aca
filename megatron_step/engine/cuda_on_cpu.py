"""What `torch.cuda` means to megatron-core where there is no CUDA device: one CPU "device" without streams.

Names that are not here come from torch.cuda itself, which says clearly that there is no CUDA when they are used.
"""

from contextlib import nullcontext
from typing import Any

import torch


def is_available() -> bool:
    """There is no CUDA device."""
    return False


def current_device() -> torch.device:
    """The device on which megatron-core makes its tensors."""
    return torch.device("cpu")


def synchronize(device: Any = None) -> None:
    """CPU operations are done when they return."""


def empty_cache() -> None:
    """The CPU allocator has no cache to give back."""


class Stream:
    """A queue of work; on the CPU all work is done at once, so it has nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()


class Event:
    """A point in a queue of work, always reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...


def current_stream(device: Any = None) -> Stream:
    """The stream that work goes to."""
    return Stream()


def default_stream(device: Any = None) -> Stream:
    """The stream that work goes to unless told otherwise."""
    return Stream()


def stream(stream: Stream | None) -> nullcontext[None]:
    """Context in which work goes to `stream`."""
    return nullcontext()


def device(device: Any) -> nullcontext[None]:
    """Context in which `device` is the current one."""
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
    """State of the CPU generator."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    """Set the state of the CPU generator."""
    torch.set_rng_state(new_state)


class random:
    """`torch.cuda.random`."""

    get_rng_state = staticmethod(get_rng_state)
    set_rng_state = staticmethod(set_rng_state)


def _lazy_init() -> None:
    """There is nothing to initialise."""


def _lazy_call(function: Any, **kwargs: Any) -> None:
    function()


def __getattr__(name: str) -> Any:
    return getattr(torch.cuda, name)

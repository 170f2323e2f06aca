"""Measures the memory of a rank: model states by their tensors, activations and the peak by what a step allocates."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_step.training.state import TrainState

T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    model_state_bytes: int
    """Weights, gradients and optimizer states."""
    activation_bytes: int
    """The most that a step needs beside them."""

    @property
    def peak_bytes(self) -> int:
        """The most in use at once."""
        return self.model_state_bytes + self.activation_bytes


def measure_step(state: TrainState, step: Callable[[], T]) -> tuple[T, Memory]:
    """Run a training step and measure what it needs; on the CPU by following every tensor, which slows this step."""
    before = model_state_bytes(state)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        result = step()
        return result, Memory(before, torch.cuda.max_memory_allocated() - before)
    with _StorageTracker() as tracker:
        result = step()
    return result, Memory(before, tracker.peak_bytes)


def model_state_bytes(state: TrainState) -> int:
    """Bytes of this rank's weights, gradient buffers and optimizer states, each storage counted once."""
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _state_tensors(state)
        }.values()
    )


def _state_tensors(state: TrainState) -> Iterable[Tensor]:
    for chunk in state.chunks:
        yield from chunk.parameters()
        for buffer in chunk.buffers:
            yield buffer.grad_data
    for part in state.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for moments in part.optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))


class _StorageTracker(TorchDispatchMode):
    """Adds up the storages that operations create, from their first sight to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What goes into an operation is either known or older than the step: only outputs can be new.
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        self._live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        self._seen[key] = weakref.ref(storage, lambda _: self._remove(key, nbytes))

    def _remove(self, key: int, nbytes: int) -> None:
        self._live_bytes -= nbytes
        del self._seen[key]

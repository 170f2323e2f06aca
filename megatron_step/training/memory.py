"""Measure the memory of a rank: model states from their tensors, activations and peak from a step's allocations."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_step.engine.compat.operations import TorchDispatchMode, tree_leaves
from megatron_step.planner.costs.memory import RankMemory
from megatron_step.training.state import TrainState

T = TypeVar("T")


def measure_step(state: TrainState, step: Callable[[], T]) -> tuple[T, RankMemory]:
    """Run a training step and measure its memory. On the CPU this tracks every tensor, which slows the step."""
    result, peak_bytes = measure_peak(step)
    return result, measure_states(state, peak_bytes)


def measure_peak(work: Callable[[], T]) -> tuple[T, int]:
    """Run `work`; return its result and the peak of the bytes that it allocated."""
    if torch.cuda.is_available():
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        return result, torch.cuda.max_memory_allocated() - allocated
    with _StorageTracker() as tracker:
        result = work()
    return result, tracker.peak_bytes


def measure_host_peak(work: Callable[[], T]) -> tuple[T, int]:
    """Run `work`; return its result and the peak of the bytes of host tensors that it added."""
    with _StorageTracker("cpu") as tracker:
        result = work()
    return result, tracker.peak_bytes


def measure_states(state: TrainState, activation_bytes: int) -> RankMemory:
    """Return the bytes of this rank's weights, gradient buffers and optimizer states; each storage counts once."""
    params = [param for chunk in state.chunks for param in chunk.parameters()]
    adapter_bytes = sum(_nbytes(param) for param in params if getattr(param, "role", "base") == "adapter")
    trained = _storages(param for param in params if param.requires_grad)
    optimizer = _storages(_optimizer_tensors(state))
    return RankMemory(
        frozen_weight_bytes=sum(_storages(param for param in params if not param.requires_grad).values()),
        # The distributed optimizer keeps all trained weights in one buffer, including adapters.
        trained_weight_bytes=sum(trained.values()) - adapter_bytes,
        adapter_weight_bytes=adapter_bytes,
        gradient_bytes=sum(_storages(buffer.grad_data for chunk in state.chunks for buffer in chunk.buffers).values()),
        optimizer_bytes=sum(nbytes for storage, nbytes in optimizer.items() if storage not in trained),
        activation_bytes=activation_bytes,
    )


def measure_resting(state: TrainState) -> int:
    """Return the bytes of host memory in which optimizer states of this rank's resting weights wait."""
    params = (param for chunk in state.chunks for param in chunk.parameters())
    waiting = (param.resting for param in params if getattr(param, "resting", None) is not None)
    return sum(_nbytes(tensor) for own in waiting for tensor in own.states.values())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the tensors' storages, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _optimizer_tensors(state: TrainState) -> Iterable[Tensor]:
    assert state.optimizer is not None
    for part in state.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for moments in part.optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))


class _StorageTracker(TorchDispatchMode):
    """Adds up the live storages that operations create, on all devices or on one type of device."""

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self.peak_bytes = 0
        self._live_bytes = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The inputs of an operation are known or older than the step, so only outputs can be new.
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        device_type = storage.device.type
        if key in self._seen or device_type == "meta" or self._device_type not in (None, device_type):
            return
        nbytes = storage.nbytes()
        self._live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        self._seen[key] = weakref.ref(storage, lambda _: self._remove(key, nbytes))

    def _remove(self, key: int, nbytes: int) -> None:
        self._live_bytes -= nbytes
        del self._seen[key]

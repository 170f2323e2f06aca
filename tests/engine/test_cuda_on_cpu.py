"""The replacement of torch.cuda works on the CPU, and raises a clear error for names that need CUDA."""

import pytest
import torch

from megatron_step.engine import cuda_on_cpu


def test_the_device_is_the_cpu() -> None:
    assert not cuda_on_cpu.is_available()
    assert torch.zeros(1, device=cuda_on_cpu.current_device()).device.type == "cpu"


def test_random_numbers_are_the_cpus() -> None:
    cuda_on_cpu.manual_seed(7)
    state = cuda_on_cpu.get_rng_state()
    first = torch.rand(3)
    cuda_on_cpu.random.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert cuda_on_cpu.default_generators[0] is torch.default_generator


def test_streams_and_events_order_nothing() -> None:
    with cuda_on_cpu.stream(cuda_on_cpu.Stream()), cuda_on_cpu.device(0):
        stream = cuda_on_cpu.current_stream()
        event = stream.record_event()
        stream.wait_event(event)
        event.synchronize()
        cuda_on_cpu.synchronize()
    assert isinstance(event, cuda_on_cpu.Event)


def test_calls_put_off_until_there_is_a_device_run_at_once() -> None:
    called = []
    cuda_on_cpu._lazy_call(lambda: called.append(True))
    assert called == [True]


def test_other_names_are_torchs_own() -> None:
    assert cuda_on_cpu.DeferredCudaCallError is torch.cuda.DeferredCudaCallError
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cuda_on_cpu.no_such_name

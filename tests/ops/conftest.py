"""Fixtures for tests of operations: the kernel's path and torch's, and an error bound taken from torch's error."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_step.ops import dispatch

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on the C++ kernels and once as on a machine without them."""
    if request.param == "kernel" and not dispatch.extension_available():
        pytest.skip("the C++ extension is not built")
    with taking(request.param):
        yield request.param


@contextmanager
def taking(path: str) -> Iterator[None]:
    """Operations take the faster libraries and kernels of this machine ("kernel"), or plain torch alone ("torch")."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "torch":
            patch.setattr(dispatch, "extension_available", lambda: False)
            patch.setattr(dispatch, "_prefer_onednn", lambda: False)
        yield


@pytest.fixture
def kernel() -> None:
    """The test needs the C++ kernels."""
    if not dispatch.extension_available():
        pytest.skip("the C++ extension is not built")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def outputs_and_gradients(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of all floating inputs for one fixed upstream gradient per output."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    outputs = operation(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    # Drawn in fp32 and rounded to bf16, so that every precision sees exactly the same upstream gradient.
    upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.fixture
def assert_as_exact_as_torch() -> Callable[[Operation, Operation, Sequence[Tensor]], None]:
    """Outputs and gradients of ``operation`` err at most twice as much as ``reference``, both against float64."""

    def check(operation: Operation, reference: Operation, inputs: Sequence[Tensor]) -> None:
        exact = outputs_and_gradients(reference, [x.double() for x in inputs])
        of_torch = outputs_and_gradients(reference, inputs)
        ours = outputs_and_gradients(operation, inputs)
        for index, (x, y, z) in enumerate(zip(ours, of_torch, exact)):
            assert x.shape == z.shape
            assert x.dtype == y.dtype
            error, bound = (x.double() - z).norm(), 2 * (y.double() - z).norm()
            # One rounding of the result is no error of the operation, even where torch happens to hit the exact value.
            assert error <= max(bound, torch.finfo(x.dtype).eps * z.norm()), f"tensor {index}: {error} > {bound}"

    return check


@pytest.fixture
def assert_bf16_weights_compute_in_fp32() -> Callable[[Callable[..., Tensor], Tensor, Sequence[Tensor]], None]:
    """An fp32 x and bf16 weights give the fp32 output and gradients that the same weights in fp32 give."""

    def check(operation: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> None:
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            leaves = [x.clone(), *(weight.bfloat16().to(dtype) for weight in weights)]
            for leaf in leaves:
                leaf.requires_grad_().grad_dtype = torch.float32
            y = operation(*leaves)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for index, (expected, found) in enumerate(zip(*results)):
            assert found.dtype == torch.float32
            error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error < 1e-6, f"tensor {index}: relative error {error:.1e}"

    return check


@pytest.fixture
def assert_exact_and_unbiased() -> Callable[[Operation, Operation, Sequence[Tensor]], None]:
    """Check both paths like `assert_as_exact_as_torch`; the largest error and the bias are at most twice torch's.

    The bias of x is the share of the exact z by which x is too large on average, <x - z, z> / <z, z>. What every sum
    leaves out shows in the bias, however small it is beside errors of either sign.
    """

    def bias(x: Tensor, z: Tensor) -> float:
        return float(((x.double() - z) * z).sum() / z.square().sum())

    def check_tensor(x: Tensor, y: Tensor, z: Tensor, name: str) -> None:
        epsilon, limit = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
        error, bound = (x.double() - z).norm(), 2 * (y.double() - z).norm()
        assert error <= max(bound, epsilon * z.norm()), f"{name}: error {error} > {bound}"
        largest, bound = (x.double() - z).abs().max(), 2 * (y.double() - z).abs().max()
        assert largest <= max(bound, epsilon * z.abs().max()), f"{name}: largest error {largest} > {bound}"
        # Errors of either sign leave this much in the mean of as many numbers as make up most of z.
        count = float(z.square().sum() ** 2 / z.pow(4).sum())
        noise = 4 * float((y.double() - z).norm() / z.norm()) / count**0.5
        ours_bias, bound = abs(bias(x, z)), 2 * abs(bias(y, z))
        # A few numbers can make up nearly all of z; their one rounding is then a bias that nothing can avoid.
        rounding = abs(bias(z.to(x.dtype), z))
        assert ours_bias <= max(bound, noise, rounding + limit), f"{name}: bias {ours_bias} > {bound}"

    def check(operation: Operation, reference: Operation, inputs: Sequence[Tensor]) -> None:
        exact = outputs_and_gradients(reference, [x.double() for x in inputs])
        of_torch = outputs_and_gradients(reference, inputs)
        for path in ("kernel", "torch") if dispatch.extension_available() else ("torch",):
            with taking(path):
                ours = outputs_and_gradients(operation, inputs)
            for index, (x, y, z) in enumerate(zip(ours, of_torch, exact)):
                check_tensor(x, y, z, f"{path}, tensor {index}")

    return check


@pytest.fixture
def assert_same_on_any_number_of_threads(
    set_threads: Callable[[int], None],
) -> Callable[[Operation, Sequence[Tensor]], None]:
    """Outputs and gradients are bit for bit the same on 1, 2 and 3 threads."""

    def check(operation: Operation, inputs: Sequence[Tensor]) -> None:
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(outputs_and_gradients(operation, inputs))
        for other in results[1:]:
            for x, y in zip(results[0], other):
                assert torch.equal(x, y)

    return check

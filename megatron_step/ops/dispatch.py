"""Choice of the backend: the C++ extension if it has a kernel for the device and the type, else torch."""

import functools
import importlib
from typing import Literal

import torch

from megatron_step.engine.compat.operations import has_kernel, has_onednn_linear, onednn_uses_avx512
from megatron_step.engine.launcher import speaks
from megatron_step.engine.messages import warn
from megatron_step.ops.fakes import register_fakes, unknown_kernels

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""Types that the CPU's kernels read and write; all kernels compute in float32."""
CUDA_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the CUDA kernels read and write."""
CUDA_KERNEL_DEVICE = "cuda"


def backend(device: torch.device) -> Literal["C++", "CUDA", "torch"]:
    """Return what computes the operations on a device: the extension's C++ or CUDA kernels, or torch alone."""
    if device.type == CUDA_KERNEL_DEVICE:
        return "CUDA" if cuda_extension_available() else "torch"
    return "C++" if device.type == "cpu" and extension_available() else "torch"


@torch.compiler.assume_constant_result
def extension_available() -> bool:
    """Load the C++ extension ``megatron_step._C`` and return whether it is built; warn once if it is not."""
    return _load_extension()


@functools.cache
def _load_extension() -> bool:
    try:
        importlib.import_module("megatron_step._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        _warn_without_extension("is not built" if missing else f"cannot be loaded ({error})")
        return False
    if unknown := unknown_kernels():
        _warn_without_extension(f"was built from other sources ({', '.join(unknown)} differ)")
        return False
    register_fakes()
    return True


def _warn_without_extension(fact: str) -> None:
    if speaks():
        warn(
            f"the C++ extension {fact}: operations run in plain torch, which is slower and takes more memory than "
            "planned on a CPU. To build the extension, run pip install --no-build-isolation . in a clone of the "
            "repository"
        )


@torch.compiler.assume_constant_result
def cuda_extension_available() -> bool:
    """Return whether the C++ extension is built with the CUDA kernels."""
    return extension_available() and has_kernel("megatron_step::adapter_shrink", "CUDA")


def use_kernel(*tensors: torch.Tensor) -> bool:
    """Return whether the CPU's kernel takes these tensors; the caller's plain-torch path takes all others."""
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype in KERNEL_DTYPES for tensor in tensors)
    return on_cpu and extension_available()


def use_cuda_kernel(tensor: torch.Tensor) -> bool:
    """Return whether the CUDA kernels take tensors of this tensor's device and type."""
    fits = tensor.device.type == CUDA_KERNEL_DEVICE and tensor.dtype in CUDA_KERNEL_DTYPES
    return fits and cuda_extension_available()


def use_onednn(*tensors: torch.Tensor, terms: int) -> bool:
    """Return whether oneDNN computes a float32 product of these tensors instead of the BLAS that ``torch.mm`` calls.

    Each element of the product is a sum of so many ``terms``. With AVX-512, oneDNN's sums of 2,048 to 8,192 terms have
    over twice the error of the BLAS's sums, those of 1,024 terms have 1.7 times.
    """
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return on_cpu and terms <= _MOST_TERMS and prefer_onednn()


_MOST_TERMS = 1024
"""Terms of the longest sums that oneDNN computes exactly enough."""


@torch.compiler.assume_constant_result
def prefer_onednn() -> bool:
    """Return whether oneDNN computes products on this CPU: with AVX-512, oneDNN is much faster than the BLAS.

    Without AVX-512 both take about the same time, and oneDNN's float32 sums of 1,024 terms and more have over twice the
    error of the BLAS's sums.
    """
    return _prefer_onednn()


@functools.cache
def _prefer_onednn() -> bool:
    return has_onednn_linear() and onednn_uses_avx512()

"""Where an operation runs: the C++ kernels, if built, for float32 and bfloat16 tensors on the CPU, else torch."""

import functools
import importlib
import warnings

import torch

from megatron_step.ops.fakes import register_fakes

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""What the C++ kernels read and write; they compute in float32."""


@torch.compiler.assume_constant_result
def extension_available() -> bool:
    """Whether the C++ extension ``megatron_step._C`` is built. Loads it, and warns once where it is not."""
    return _load_extension()


@functools.cache
def _load_extension() -> bool:
    try:
        importlib.import_module("megatron_step._C")
    except ImportError as error:
        warnings.warn(
            f"the C++ extension megatron_step._C is not built ({error}): operations run as plain torch, slower on the "
            "CPU. Build it with: pip install -e . --no-build-isolation",
            stacklevel=4,
        )
        return False
    register_fakes()
    return True


def use_kernel(*tensors: torch.Tensor) -> bool:
    """Whether the C++ kernel takes these tensors; the caller's plain-torch path takes all others."""
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype in KERNEL_DTYPES for tensor in tensors)
    return on_cpu and extension_available()


def use_onednn(*tensors: torch.Tensor) -> bool:
    """Whether a float32 product on the CPU can go to oneDNN's linear instead of the BLAS behind ``torch.mm``."""
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return on_cpu and _has_onednn()


@torch.compiler.assume_constant_result
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

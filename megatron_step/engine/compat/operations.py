"""Operations of torch that have no public name, and the class that observes all operations."""

import os
from typing import Any

import torch
from torch import Tensor

# Observe every operation of a block, to measure memory; torch documents both under these paths (torch 2.13.0).
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

# torch.optim.AdamW calls it too, but keeps a step count for each parameter (torch 2.13.0).
fused_adamw_ = torch._fused_adamw_
"""fused_adamw_(params, grads, first moments, second moments, [], step counts, lr=..., ...): update in place."""

# It scales all gradients in one call; torch.nn.utils.clip_grad_norm_ uses it, too (torch 2.13.0).
foreach_mul_ = torch._foreach_mul_
"""foreach_mul_(tensors, factor): multiply each, in place."""

# It checks on the device, so that the host does not wait (torch 2.13.0).
assert_async = torch._assert_async
"""assert_async(condition, message): fail on the device if the condition, a tensor, is false."""


def has_kernel(operation: str, dispatch_key: str) -> bool:
    """Return whether an operation, such as "aten::mm", has a kernel for a device, such as "CPU"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation, dispatch_key)  # no public way (torch 2.13.0)


def argument_names(name: str) -> list[str] | None:
    """Names of the arguments of an operation such as "aten::mm"; None if there is no such operation."""
    namespace, operation = name.split("::")
    if not hasattr(getattr(torch.ops, namespace), operation):
        return None
    schema = getattr(getattr(torch.ops, namespace), operation).default._schema  # no public way (torch 2.13.0)
    return [argument.name for argument in schema.arguments]


def has_onednn_linear() -> bool:
    """Return whether `onednn_linear` works in this build of torch."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_uses_avx512() -> bool:
    """Whether oneDNN computes with AVX-512: the CPU has AVX-512, and no variable of the environment forbids it.

    torch finds out what the CPU has; ATEN_CPU_CAPABILITY can lower what torch says, and counts here too.
    """
    # oneDNN reads the first of the two that is set, in any case of letters (oneDNN 3.12.0).
    names = [name for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ]
    limit = os.environ[names[0]].upper() if names else "DEFAULT"
    allowed = limit not in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
    return allowed and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_linear(x: Tensor, weight: Tensor) -> Any:
    """Return x Wᵀ [..., o], computed by oneDNN on the CPU; x [..., i] and weight [o, i] may be transposed views."""
    # F.linear calls the BLAS, which is slower for some shapes (torch 2.13.0).
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

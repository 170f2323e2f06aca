"""The CUDA kernels of the adapter linear compared with a roofline: bytes, operations, and time on a GPU.

The roofline is arithmetic for an H100: the time of a kernel is its bytes at the achieved bandwidth, or its operations
at the achieved rate, whichever is longer. The frozen product reads the kernels' results while it computes, at no cost.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import Row, interleave, spread
from megatron_step import ops
from megatron_step.ops import adapter_kernels, dispatch

H100_BYTES_PER_SECOND = 2.8e12
H100_FLOPS_PER_SECOND = 7e14
"""Achieved bf16 rate of the tensor cores."""
H100_DRAWS_PER_SECOND = 9e11
"""Mask elements per second: about 16 integer instructions each, 64 per clock on 132 multiprocessors at 1.7 GHz."""
_CALLS = 20


@dataclass(frozen=True)
class Sizes:
    """Sizes of a square bf16 linear with an adapter."""

    tokens: int = 8192
    """Rows of the linear's input."""
    hidden_size: int = 4096
    """Width of the linear's input and output."""
    rank: int = 16
    """Rank of the adapter."""

    @property
    def frozen_flops(self) -> int:
        """Floating-point operations of the frozen linear: forward and input gradient."""
        return 4 * self.tokens * self.hidden_size**2


@dataclass(frozen=True)
class Work:
    """The bytes and operations of a kernel. Partial sums are written, and read once more to be added."""

    name: str
    """Name of the kernel and of its result."""
    wide_bytes: int
    """Bytes of activations read or written."""
    narrow_bytes: int
    """Bytes of factors, of u and du, and of partial sums."""
    flops: int
    """Floating-point operations."""
    draws: int = 0
    """Elements of the dropout mask."""

    def seconds(self, dropout: bool) -> float:
        """Least time on an H100 in seconds."""
        moving = (self.wide_bytes + self.narrow_bytes) / H100_BYTES_PER_SECOND
        drawing = self.draws / H100_DRAWS_PER_SECOND if dropout else 0.0
        return max(moving, drawing, self.flops / H100_FLOPS_PER_SECOND)


def work(sizes: Sizes) -> list[Work]:
    """Return the work of each kernel of forward and backward, for ranks up to 32."""
    t, h, r = sizes.tokens, sizes.hidden_size, sizes.rank
    wide, factor, u, flops = 2 * t * h, 2 * h * r, 4 * t * r, 2 * t * h * r
    shrink_parts, gradient_parts = _parts(h, _tiles(t)), _parts(t, _tiles(h))
    pass_blocks = -(-h // 256)
    pass_parts = 2 * pass_blocks * u + 2 * _parts(t, pass_blocks) * 4 * h * r
    return [
        Work("shrink: u", wide, factor + 2 * shrink_parts * u, flops, t * h),
        Work("expand: s u Bᵀ", wide, factor + u, flops),
        Work("output_gradients: du, dB", wide, factor + u + pass_parts, 2 * flops),
        Work("expand: mask * (du A)", wide, factor + u, flops, t * h),
        Work("factor_gradient: dA", wide, u + 2 * gradient_parts * 4 * h * r, flops, t * h),
    ]


def _tiles(length: int) -> int:
    return -(-length // 64)


def _parts(length: int, blocks: int) -> int:
    """Number of partial sums into which csrc/adapter_kernels.h splits a sum."""
    part = max(_tiles(-(-length // max(512 // blocks, 1))) * 64, 256)
    return -(-length // part)


def run(repeats: int, sizes: Sizes | None = None) -> list[Row]:
    """Return a row for each kernel, and one for their sum with the frozen linear; on a GPU also measured times."""
    sizes = Sizes() if sizes is None else sizes
    rows = [row for dropout in (False, True) for row in _rows(sizes, dropout)]
    return rows + (_measured(repeats, sizes) if dispatch.cuda_extension_available() else [])


def _title(kind: str, sizes: Sizes) -> str:
    return f"adapter's kernels, bf16, {sizes.tokens} tokens, hidden {sizes.hidden_size}, rank {sizes.rank}: {kind}"


def _rows(sizes: Sizes, dropout: bool) -> list[Row]:
    kernels = work(sizes)
    frozen = sizes.frozen_flops / H100_FLOPS_PER_SECOND
    total = sum(kernel.seconds(dropout) for kernel in kernels)
    return [
        {
            "benchmark": _title("arithmetic for an H100, not measured", sizes),
            "dropout": "yes" if dropout else "no",
            "kernel": name,
            "mib": mib,
            "gflop": gflop,
            "microseconds": 1e6 * seconds,
            "of_frozen": seconds / frozen,
        }
        for name, mib, gflop, seconds in [
            *((k.name, (k.wide_bytes + k.narrow_bytes) / 2**20, k.flops / 1e9, k.seconds(dropout)) for k in kernels),
            ("frozen linear", 0.0, sizes.frozen_flops / 1e9, frozen),
            ("frozen linear with the adapter", 0.0, 0.0, frozen + total),
        ]
    ]


def _measured(repeats: int, sizes: Sizes) -> list[Row]:
    """Measure microseconds of every kernel, and of a copy of x, which reads and writes one activation."""
    seconds = interleave({name: _repeated(call) for name, call in arms(sizes, torch.device("cuda")).items()}, repeats)
    return [
        {
            "benchmark": _title(torch.cuda.get_device_name(), sizes),
            "kernel": name,
            **spread([1e6 * value / _CALLS for value in values], "microseconds"),
        }
        for name, values in seconds.items()
    ]


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()

    return calls


def arms(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return a function for each kernel that runs it on operands on a device."""
    t, h, r = sizes.tokens, sizes.hidden_size, sizes.rank

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, dy, weight, a, b = random(t, h), random(t, h), random(h, h), random(r, h), random(h, r)
    u = torch.randn(t, r, device=device)
    dropout = ops.AdapterDropout(0.1, seed=1, first_column=0, num_columns=h)
    operators = torch.ops.megatron_step
    return {
        "copy of x": lambda: x.clone(),
        "x Wᵀ": lambda: x.mm(weight.t()),
        "shrink: u": lambda: adapter_kernels.shrink(x, a, None),
        "shrink: u, dropout": lambda: adapter_kernels.shrink(x, a, dropout),
        "expand: s u Bᵀ": lambda: operators.adapter_expand(u, b, False, 2.0, 0.0, 0, 0, h),
        "output_gradients: du, dB": lambda: adapter_kernels.output_gradients(dy, u, b, 2.0),
        "expand: mask * (du A)": lambda: operators.adapter_expand(u, a, True, 1.0, 0.1, 1, 0, h),
        "factor_gradient: dA": lambda: adapter_kernels.shrink_gradient(u, x, None),
        "factor_gradient: dA, dropout": lambda: adapter_kernels.shrink_gradient(u, x, dropout),
    }

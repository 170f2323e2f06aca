"""Runs the adapter's kernels in a library built with sanitizers, which end the process at the first fault.

Started with AddressSanitizer's runtime loaded first, as ``run_sanitized`` does; the argument is the library.
"""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with AddressSanitizer's runtime."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)


def main() -> None:
    """Forward and backward of every type at ragged shapes, in every order of threads."""
    import torch

    from megatron_step.ops import AdapterDropout, adapter_linear, dispatch

    assert dispatch.extension_available()
    library = ctypes.CDLL(sys.argv[1])
    dispatch.CUDA_KERNEL_DEVICE = "cpu"
    dispatch.cuda_extension_available = lambda: True
    shapes = [(1, 1, 1, 1), (65, 72, 136, 17), (3, 129, 257, 32), (300, 40, 24, 8), (20, 328, 67, 70)]
    for (t, k, n, r), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16, torch.float16)):
        x, weight, a, b = (torch.randn(*shape).to(dtype) for shape in ((t, k), (n, k), (r, k), (n, r)))
        x, a, b = (leaf.requires_grad_() for leaf in (x, a, b))
        for order in range(3):
            library.set_order(order)
            adapter_linear(x, weight, a, b, 0.5, AdapterDropout(0.1, 1, 0, k)).backward(torch.ones(t, n).to(dtype))
    print("all shapes computed")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()

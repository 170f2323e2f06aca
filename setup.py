"""Build the optional C++ extension ``megatron_step._C`` (csrc/); everything else is in pyproject.toml.

The extension always has the operations for the CPU. It has the CUDA kernels if torch is built for CUDA and a toolkit
with nvcc is found. ``MSTEP_CUDA=0`` omits them; ``MSTEP_CUDA=1`` makes it an error if they cannot be built.

By default the extension runs on this machine's kind of processor. ``MSTEP_MARCH=x86-64-v3`` builds it for all
processors with AVX2, for a cluster of different nodes; any value of g++'s ``-march`` works.

Without torch in the build environment, without a C++ compiler, or if compilation fails, the package is installed
without the extension: all operations then run in torch, only slower. Install with ``--no-build-isolation``, so that the
extension is compiled against the installed torch.
"""

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CUDA_SOURCES = {"adapter_cuda.cpp"}  # compiled with every .cu file
# -fopenmp is not passed to the linker: the extension uses torch's OpenMP runtime, so that there is one thread pool.
MARCH = os.environ.get("MSTEP_MARCH", "native")
CXX_FLAGS = ["-O3", "-std=c++20", "-g0", f"-march={MARCH}", "-fopenmp", "-fno-math-errno"]
if platform.machine() in ("x86_64", "AMD64"):
    CXX_FLAGS.append("-mprefer-vector-width=512")
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"


def say(text: str) -> None:
    """Print a line, which pip shows with -v or if the build fails."""
    print(f"megatron_step: {text}", file=sys.stderr)


def cuda_toolkit() -> Path | None:
    """Return the folder with nvcc and CUDA's headers, or None."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders += [nvcc and Path(nvcc).resolve().parents[1]]
    places = [Path(folder) for folder in folders if folder]
    return next((p for p in places if (p / "bin/nvcc").exists() and (p / "include/cuda_runtime.h").exists()), None)


def reason_against_cuda(torch_cuda: str | None, toolkit: Path | None) -> str | None:
    """Return the reason why the CUDA kernels are not built, or None."""
    if os.environ.get("MSTEP_CUDA") == "0":
        return "MSTEP_CUDA=0"
    if torch_cuda is None:
        return "torch is built for the CPU"
    return None if toolkit else "no CUDA toolkit with bin/nvcc and include/cuda_runtime.h: set CUDA_HOME"


def extension_arguments() -> dict:
    """Return setuptools' ``ext_modules`` and ``cmdclass`` of the extension, or {} without torch."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        say("torch not found at build time; installing without the C++ extension")
        return {}

    class OptionalBuildExtension(cpp_extension.BuildExtension):
        """Build command that uses ninja if it is installed; after a failure the package is pure Python."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("MSTEP_CUDA") == "1":
                    raise
                say(f"the C++ extension was not built ({error}); operations run as plain torch, slower")

    toolkit = cuda_toolkit()
    against_cuda = reason_against_cuda(torch.version.cuda, toolkit)
    if against_cuda and os.environ.get("MSTEP_CUDA") == "1":
        raise SystemExit(f"megatron_step: MSTEP_CUDA=1, but the CUDA kernels cannot be built: {against_cuda}")
    sources = [path for path in (ROOT / "csrc").glob("*.cpp") if not against_cuda or path.name not in CUDA_SOURCES]
    if against_cuda:
        say(f"building the CPU's operations, without the CUDA kernels ({against_cuda})")
        make, flags, includes = cpp_extension.CppExtension, {"cxx": CXX_FLAGS}, []
    else:
        say(f"building the CPU's operations and the CUDA kernels, with {toolkit}")
        sources += (ROOT / "csrc").glob("*.cu")
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        cpp_extension.CUDA_HOME = str(toolkit)
        make, flags = cpp_extension.CUDAExtension, {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
        # torch's headers include those of cuBLAS and others, which torch's wheels bring if the toolkit lacks them.
        includes = [
            str(path.parent) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/include/cusparse.h")
        ]
    names = sorted(str(path.relative_to(ROOT)) for path in sources)
    extension = make("megatron_step._C", names, include_dirs=includes, extra_compile_args=flags)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuildExtension}}


setup(**extension_arguments())

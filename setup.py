"""Builds the optional C++ extension ``megatron_step._C`` (csrc/); everything else is in pyproject.toml.

Without torch in the build environment, without a C++ compiler, or if compilation fails, the package is installed
without the extension: all operations then run as plain torch, only slower. Install with ``--no-build-isolation``, so
that the extension is compiled against the torch it will run with.
"""

import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The extension is compiled for the machine it is built on. -fopenmp is not passed to the linker: the OpenMP runtime
# is the one torch brings, so that there is one pool of threads.
COMPILE_FLAGS = ["-O3", "-std=c++20", "-march=native", "-fopenmp", "-fno-math-errno"]
if platform.machine() in ("x86_64", "AMD64"):
    COMPILE_FLAGS.append("-mprefer-vector-width=512")


def extension_arguments() -> dict:
    """``ext_modules`` and ``cmdclass`` of the extension, or nothing where torch is missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("megatron_step: torch not found at build time; installing without the C++ extension", file=sys.stderr)
        return {}

    class OptionalBuildExtension(BuildExtension):
        """Compiles with ninja where there is one; a failure leaves a pure-Python package and one message."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                print(
                    f"megatron_step: the C++ extension was not built ({error}); operations run as plain torch, slower",
                    file=sys.stderr,
                )

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    extension = CppExtension("megatron_step._C", sources, extra_compile_args=COMPILE_FLAGS)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuildExtension}}


setup(**extension_arguments())

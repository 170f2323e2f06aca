"""Compile every CUDA kernel with nvcc for several architectures, print its registers, and fail if one spills.

    python csrc/compile_kernels.py [ARCHITECTURE ...]        default: 80 90 100

This needs the CUDA toolkit and the headers of torch (also of a build for the CPU), but no GPU.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent
ARCHITECTURES = ("80", "90", "100")
_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class CompileError(Exception):
    """Error if nvcc is missing or cannot compile a kernel."""


@dataclass(frozen=True)
class Kernel:
    """Resources of one instance of a kernel."""

    name: str
    """Name of the instance."""
    architecture: str
    """The architecture, such as sm_90."""
    registers: int
    """Registers of a thread."""
    local_bytes: int
    """Bytes of a thread's stack and spilled registers, which lie in slow main memory; 0 in a good kernel."""


def compile_kernels(sources: Sequence[Path], architectures: Sequence[str]) -> list[Kernel]:
    """Compile every kernel in the sources for every architecture, two files at a time.

    Raises:
        CompileError: nvcc is missing or cannot compile a file.
    """
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise CompileError("nvcc is neither on the PATH nor in /usr/local/cuda/bin: install the CUDA toolkit")
    with ThreadPoolExecutor(2) as pool:
        kernels = list(pool.map(lambda source: _compile(nvcc, source, architectures), sources))
    return [kernel for file_kernels in kernels for kernel in file_kernels]


def _compile(nvcc: str, source: Path, architectures: Sequence[str]) -> list[Kernel]:
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{CSRC}"]
    flags += [f"-I{path}" for path in include_paths()]
    flags += [flag for a in architectures for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, "-c", str(source), "-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{source.name}:\n{done.stderr}")
    usages = list(_USAGE.finditer(done.stderr))
    names = _readable([usage["name"] for usage in usages])
    return [
        Kernel(
            name,
            f"sm_{usage['architecture']}",
            int(usage["registers"]),
            int(usage["stack"]) + int(usage["stores"]) + int(usage["loads"]),
        )
        for name, usage in zip(names, usages)
    ]


def _readable(names: Sequence[str]) -> list[str]:
    """Return C++ names without parameters and namespaces if c++filt is installed, else the mangled names."""
    if shutil.which("c++filt") is None:
        return list(names)
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = done.stdout.replace("(megatron_step::Factor)0", "A").replace("(megatron_step::Factor)1", "B")
    plain = re.sub(r"(?m)^void |megatron_step::|\(anonymous namespace\)::|c10::", "", plain)
    return re.sub(r"\(.*", "", plain).splitlines()


def table(kernels: Sequence[Kernel]) -> str:
    """Return a table of each kernel's registers by architecture, and its local memory if there is any."""
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    lines = [f"{'registers of a thread':44}" + "".join(f"{name:>9}" for name in architectures)]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        own = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        spilled = sum(kernel.local_bytes for kernel in own.values())
        row = f"{name:44}" + "".join(f"{own[a].registers:9}" for a in architectures)
        lines.append(row + (f"   {spilled} bytes of local memory" if spilled else ""))
    return "\n".join(lines)


def main() -> None:
    """Compile all kernels; exit with status 1 if one uses local memory, and 2 if compilation fails."""
    try:
        kernels = compile_kernels(sorted(CSRC.glob("*.cu")), sys.argv[1:] or ARCHITECTURES)
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(kernels))
    spilled = [kernel for kernel in kernels if kernel.local_bytes]
    if spilled:
        sys.exit(f"error: {len(spilled)} kernels use local memory: reduce their registers or arrays")


if __name__ == "__main__":
    main()

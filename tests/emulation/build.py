"""Compiles the CUDA kernels with g++ against the emulation beside this file, for tests where there is no GPU."""

import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = (
    "-fsanitize=address,bounds,alignment,shift,signed-integer-overflow",
    "-fno-sanitize-recover=undefined",
)
_CACHE = HERE.parents[1] / "build" / "emulation"


def emulation_works() -> bool:
    """Return whether there is a compiler, and the machine is one whose fibers the emulation knows."""
    return shutil.which("g++") is not None and sysconfig.get_platform() == "linux-x86_64"


@functools.cache
def emulated_operators(sanitized: bool = False) -> Path:
    """The library that registers torch's adapter operators for CPU tensors, run by the emulated kernels.

    With AddressSanitizer and UndefinedBehaviorSanitizer in the kernels, if asked for.
    """
    flags = SANITIZERS if sanitized else ()
    sources = [(CSRC / "adapter_cuda.cpp", ()), (HERE / "order.cpp", ())]
    sources += [(kernel, flags) for kernel in sorted(CSRC.glob("adapter_*.cu"))]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    return _library(_objects(sources), [*flags, *libraries])


def library_of(source: Path, sanitized: bool = False) -> Path:
    """A library of one file of kernels that needs no torch; headers beside the file come before those of csrc."""
    flags = SANITIZERS if sanitized else ("-O0",)
    return _library(_objects([(source, flags), (HERE / "order.cpp", ())]), flags)


def _objects(sources: Sequence[tuple[Path, Sequence[str]]]) -> list[Path]:
    """Compiled files, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: _object(*source), sources))


def _object(source: Path, flags: Sequence[str]) -> Path:
    """The file compiled, unless it already was with these very headers and flags."""
    headers = [path for folder in {source.parent, CSRC, HERE} for path in sorted(folder.glob("*.*h"))]
    contents = [path.read_bytes() for path in (source, *headers, Path(__file__))]
    path = _CACHE / f"{source.stem}-{_digest([*contents, ' '.join(flags).encode()])}.o"
    if not path.exists():
        includes = [f"-I{folder}" for folder in (source.parent, CSRC, HERE, *include_paths())]
        command = ["g++", "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-DMEGATRON_STEP_EMULATION", *flags, *includes]
        _run_to(path, [*command, "-c", str(source)])
    return path


def _library(objects: Sequence[Path], flags: Sequence[str]) -> Path:
    path = _CACHE / f"{_digest([path.name.encode() for path in objects])}.so"
    if not path.exists():
        _run_to(path, ["g++", "-shared", *map(str, objects), *flags])
    return path


def _run_to(path: Path, command: list[str]) -> None:
    _CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")  # another may make the same
    finished = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{finished.stderr}")
    unfinished.rename(path)


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

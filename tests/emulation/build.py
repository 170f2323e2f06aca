"""Compiles the CUDA kernels with g++ against the emulation beside this file, for tests where there is no GPU."""

import functools
import hashlib
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = sorted(CSRC.glob("adapter_*.cu"))
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
_CACHE = HERE.parents[1] / "build" / "emulation"


def compiler() -> str | None:
    """g++, where the emulation works: its fibers are x86-64's."""
    return shutil.which("g++") if sysconfig.get_platform() == "linux-x86_64" else None


def emulated_operators(sanitized: bool = False) -> Path:
    """The library that registers torch's adapter operators for CPU tensors, run by the emulated kernels."""
    sources = [*KERNELS, CSRC / "adapter_cuda.cpp", HERE / "order.cpp"]
    return _library(tuple(sources), SANITIZERS if sanitized else ())


def library_of(source: Path) -> Path:
    """A library of one file of kernels alone, without torch."""
    return _library((source,), ())


@functools.cache
def _library(sources: tuple[Path, ...], flags: tuple[str, ...]) -> Path:
    """Compiled unless these very sources already were."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(source, flags), sources))
    library = _CACHE / f"{_digest([path.name.encode() for path in objects])}.so"
    if not library.exists():
        libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        _run_to(library, ["g++", "-shared", *flags, *map(str, objects), *libraries])
    return library


def _object(source: Path, flags: Sequence[str]) -> Path:
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *HERE.glob("*.h")]
    contents = [path.read_bytes() for path in (source, *sorted(headers), Path(__file__))]
    path = _CACHE / f"{source.stem}-{_digest([*contents, ' '.join(flags).encode()])}.o"
    if not path.exists():
        includes = [f"-I{folder}" for folder in (CSRC, HERE, *include_paths())]
        command = ["g++", "-x", "c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-DMEGATRON_STEP_EMULATION"]
        _run_to(path, [*command, *flags, *includes, "-c", str(source)])
    return path


def _run_to(path: Path, command: list[str]) -> None:
    unfinished = path.with_suffix(f".{path.suffix}.unfinished")
    finished = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{finished.stderr}")
    unfinished.rename(path)


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

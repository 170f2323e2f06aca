"""Operations, a parallel oracle and a resumed run on other processors than this machine's own.

torch and oneDNN choose their kernels by processor when they are loaded, and the extension is compiled for one. So each
case runs pytest in a separate process, in which all three take the named instructions.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_step.ops import dispatch

REPOSITORY = Path(__file__).parents[1]
EXACT = "test_error_is_at_most_twice_that_of_torch"
TESTS = [
    *(f"tests/ops/test_{name}.py::{EXACT}" for name in ("attention", "linear", "linear_cross_entropy", "rms_norm")),
    *(f"tests/ops/test_{name}.py::{EXACT}" for name in ("adapter_linear", "rotary", "swiglu")),
    "tests/ops/test_real_sizes.py::test_linear",
    "tests/parallel/test_parallel_equals_serial.py::test_layout_equals_one_process[plain-TP2 SP]",
    "tests/training/test_resume.py::test_killed_run_goes_on_bit_for_bit[one process]",
]
# Python runs it at the start of every process, those of worlds too: the extension is the file's, or is not there.
CHOOSE_EXTENSION = """
import importlib.util, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "megatron_step._C":
            return None
        if {file!r} is None:
            raise ImportError("left out")
        return importlib.util.spec_from_file_location(name, {file!r})

sys.meta_path.insert(0, Finder)
"""


def run_tests(folder: Path, extension: Path | None, torch_kernels: str, onednn_kernels: str) -> str:
    """Run TESTS, which must pass, with this extension and these kernels; returns what pytest prints."""
    folder.joinpath("sitecustomize.py").write_text(CHOOSE_EXTENSION.format(file=extension and str(extension)))
    paths = [str(folder), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "ATEN_CPU_CAPABILITY": torch_kernels,
        "ONEDNN_MAX_CPU_ISA": onednn_kernels,
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rs", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def avx2_extension() -> Path:
    """The extension of a processor without AVX-512: this machine's own, or one that is built here."""
    if not dispatch.extension_available():
        pytest.skip("the C++ extension is not built")
    name = f"megatron_step/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        return REPOSITORY / name
    built = REPOSITORY / "build" / "x86-64-v3"
    folders = ["--build-lib", str(built / "lib"), "--build-temp", str(built / "temp")]
    environment = {**os.environ, "MSTEP_MARCH": "x86-64-v3", "MSTEP_CUDA": "0", "MAX_JOBS": "2"}
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=True)
    return built / "lib" / name


on_linux_x86 = pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="instructions of x86-64")


@on_linux_x86
def test_all_holds_with_avx2(tmp_path: Path, avx2_extension: Path) -> None:
    assert "the C++ extension is not built" not in run_tests(tmp_path, avx2_extension, "avx2", "AVX2")


@on_linux_x86
def test_all_holds_without_the_extension_and_avx(tmp_path: Path) -> None:
    assert "the C++ extension is not built" in run_tests(tmp_path, None, "default", "SSE41")

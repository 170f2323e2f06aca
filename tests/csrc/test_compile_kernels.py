import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def module() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(CSRC / "compile_kernels.py")))


@needs_nvcc
def test_every_kernel_compiles_without_local_memory(module):
    """Compile for one architecture; `make kernels` compiles for all of them."""
    sources = sorted(CSRC.glob("*.cu"))
    kernels = module.compile_kernels(sources, ["90"])
    assert [kernel.name for kernel in kernels if kernel.local_bytes] == []
    compiled = {kernel.name.split("<")[0] for kernel in kernels}
    assert compiled == {source.stem.removeprefix("adapter_") for source in sources}
    assert all(name in module.table(kernels) for name in compiled)


@needs_nvcc
def test_a_kernel_that_spills_is_told(module, tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(
        'extern "C" __global__ void spilling(const float* x, float* y, int n) {\n'
        "  float kept[64] = {};\n"
        "  for (int i = 0; i < n; ++i) kept[i * n % 64] += x[i];\n"
        "  y[0] = kept[n];\n}\n"
    )
    (kernel,) = module.compile_kernels([source], ["90"])
    assert kernel.local_bytes > 0
    assert "bytes of local memory" in module.table([kernel])


@needs_nvcc
def test_a_file_that_does_not_compile_is_an_error(module, tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong() { nothing(); }")
    with pytest.raises(module.CompileError, match="nothing"):
        module.compile_kernels([tmp_path / "wrong.cu"], ["90"])


def test_without_nvcc_there_is_one_error(module, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(module.CompileError, match="nvcc is neither"):
        module.compile_kernels([], ["90"])

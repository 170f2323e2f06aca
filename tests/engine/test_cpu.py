"""megatron-core's modules mean the CPU where there is no CUDA device, and are untouched where there is one."""

import ast
import importlib
import subprocess
import sys

import pytest
import torch

from megatron_step.engine import cpu


def _adapted(source: str) -> str:
    return ast.unparse(cpu.adapt(ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.cuda.current_device()", "_cuda_on_cpu.current_device()"),
        ("torch.cuda.random.get_rng_state()", "_cuda_on_cpu.random.get_rng_state()"),
        ("torch.zeros(2, device='cuda')", "torch.zeros(2, device='cpu')"),
        ("torch.device('cuda:0')", "torch.device('cpu')"),
        ("x.type() == 'torch.cuda.FloatTensor'", "x.type() == 'torch.FloatTensor'"),
        ("model.weight.cuda(index, non_blocking=True)", "model.weight.cpu()"),
        ("from torch.cuda import Stream", "from megatron_step.engine.cuda_on_cpu import Stream"),
        ("print('a cuda device', other.cuda)", "print('a cuda device', other.cuda)"),
    ],
)
def test_names_of_cuda_become_the_cpus(source: str, expected: str) -> None:
    assert _adapted(source) == f"import megatron_step.engine.cuda_on_cpu as _cuda_on_cpu\n{expected}"


def test_docstrings_and_future_imports_stay_first() -> None:
    source = '"""What it is."""\nfrom __future__ import annotations\nx = 1'
    assert _adapted(source).splitlines()[:2] == ['"""What it is."""', "from __future__ import annotations"]


def test_line_numbers_stay() -> None:
    tree = cpu.adapt(ast.parse("\n\n\nx = torch.cuda.current_device()"))
    assert tree.body[-1].lineno == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="the hook does nothing where there is a CUDA device")
def test_megatron_core_makes_its_tensors_on_the_cpu() -> None:
    module = importlib.import_module("megatron.core.tensor_parallel.layers")
    assert isinstance(module.__spec__.loader, cpu._AdaptingLoader)
    assert module._cuda_on_cpu.current_device() == torch.device("cpu")


def test_nothing_is_changed_where_there_is_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    import megatron.core

    assert cpu._Finder().find_spec("megatron.core.utils", megatron.core.__path__, None) is None


def test_other_packages_are_left_alone() -> None:
    assert cpu._Finder().find_spec("megatron_core_of_another_name", None, None) is None
    assert cpu._Finder().find_spec("megatron", None, None) is None


def test_the_hook_is_installed_once() -> None:
    before = list(sys.meta_path)
    cpu.install_import_hook()
    assert sys.meta_path == before
    assert sum(isinstance(finder, cpu._Finder) for finder in before) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is nothing to adapt where there is a CUDA device")
def test_a_late_installation_is_refused() -> None:
    program = "import megatron.core, megatron_step"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "megatron.core was imported before megatron_step: import megatron_step first" in finished.stderr

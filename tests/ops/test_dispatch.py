import importlib

import torch

from megatron_step.engine.compat.operations import has_onednn_linear, onednn_uses_avx512
from megatron_step.ops import dispatch, fakes


def test_missing_extension_warns_once_in_one_line_and_runs_as_torch(monkeypatch, capsys):
    real = importlib.import_module

    def without_extension(name: str, *args: str):
        if name == "megatron_step._C":
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(dispatch.importlib, "import_module", without_extension)
    dispatch._load_extension.cache_clear()
    try:
        assert not dispatch.use_kernel(torch.ones(2))
        assert not dispatch.use_kernel(torch.ones(2))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: the C++ extension is not built: operations run in plain torch")
    finally:
        monkeypatch.undo()
        dispatch._load_extension.cache_clear()


def test_an_extension_of_other_sources_warns_and_runs_as_torch(kernel, monkeypatch, capsys):
    def swiglu_forward(x: torch.Tensor, limit: float) -> torch.Tensor:
        return x

    monkeypatch.setattr(fakes, "FAKES", (swiglu_forward,))
    dispatch._load_extension.cache_clear()
    try:
        assert not dispatch.use_kernel(torch.ones(2))
        assert "was built from other sources (swiglu_forward differ): operations run" in capsys.readouterr().err
    finally:
        monkeypatch.undo()
        dispatch._load_extension.cache_clear()


def test_kernels_take_only_their_types_and_device(kernel):
    assert dispatch.use_kernel(torch.ones(2), torch.ones(2).bfloat16())
    assert not dispatch.use_kernel(torch.ones(2).double())
    assert not dispatch.use_kernel(torch.ones(2), torch.ones(2).half())
    assert not dispatch.use_kernel(torch.ones(2, device="meta"))
    assert not dispatch.use_onednn(torch.ones(2).bfloat16(), terms=2)


def test_onednn_takes_products_where_it_computes_with_avx512(monkeypatch):
    dispatch._prefer_onednn.cache_clear()
    try:
        assert dispatch.use_onednn(torch.ones(2), terms=1024) == (has_onednn_linear() and onednn_uses_avx512())
        assert not dispatch.use_onednn(torch.ones(2), terms=1025)
        dispatch._prefer_onednn.cache_clear()
        monkeypatch.setattr(dispatch, "onednn_uses_avx512", lambda: False)
        assert not dispatch.use_onednn(torch.ones(2), terms=2)
    finally:
        dispatch._prefer_onednn.cache_clear()


def test_backend_says_what_a_device_takes(path, monkeypatch):
    assert dispatch.backend(torch.device("cpu")) == ("C++" if path == "kernel" else "torch")
    assert dispatch.backend(torch.device("meta")) == "torch"
    monkeypatch.setattr(dispatch, "cuda_extension_available", lambda: False)
    assert dispatch.backend(torch.device("cuda")) == "torch"
    monkeypatch.setattr(dispatch, "cuda_extension_available", lambda: True)
    assert dispatch.backend(torch.device("cuda")) == "CUDA"


def test_cuda_kernels_take_no_tensor_of_the_cpu(kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "cuda_extension_available", lambda: True)
    assert not dispatch.use_cuda_kernel(torch.ones(2))


def test_this_extension_has_cuda_kernels_only_if_torch_is_built_for_cuda(kernel):
    assert not dispatch.cuda_extension_available() or torch.version.cuda is not None

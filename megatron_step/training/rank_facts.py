"""Facts that must be the same on every rank before training: config, files, versions, kernels, environment."""

import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig
from megatron_step.data.indexed_format import corpus_paths
from megatron_step.engine.device import current_device
from megatron_step.ops.dispatch import backend
from megatron_step.ops.rms_norm import rms_norm

_PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "transformer-engine",
    "apex",
)

_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "GLOO_DEVICE_TRANSPORT",
    "KMP_DETERMINISTIC_REDUCTION",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NCCL_ALGO",
    "NCCL_COLLNET_ENABLE",
    "NCCL_NVLS_ENABLE",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "NVTE_FLASH_ATTN",
    "NVTE_FUSED_ATTN",
    "NVTE_UNFUSED_ATTN",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_V8_API_DISABLED",
    "TORCH_LINEAR_FLATTEN_3D",
)
"""Environment variables that change results or the communication between ranks. Variables for the devices, the network
and the logs of one machine are left out, because they may differ."""

ADVICE = {
    "config": "Start every rank with the same config and options",
    "files": "Give every machine the same copy of the file",
    "versions": "Install the same versions on every machine",
    "kernels": "Build and install the package in the same way on every machine",
    "environment": "Set it to one value for every rank",
}
"""Advice if ranks differ, by section."""


def rank_facts(config: RunConfig, fingerprint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the facts of this rank, by section and name. `fingerprint` is the fingerprint of its data.

    On the CPU, the number of threads is a fact: sums are split over threads, so copies of a weight would drift apart.
    With CUDA, the number of threads and the devices may differ.
    """
    kernels: dict[str, Any] = {"the backend of the operations": backend(current_device())}
    environment: dict[str, Any] = {name: os.environ.get(name, "nothing") for name in _VARIABLES}
    if current_device().type == "cpu":
        kernels["the CPU's instructions"] = torch.backends.cpu.get_cpu_capability()
        kernels["the CPU's result of a test computation"] = _probe()
        environment["the number of threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
    return {
        "config": dict(_leaves(config, "")),
        "files": _files(config, fingerprint),
        "versions": _versions(),
        "kernels": kernels,
        "environment": environment,
    }


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every key of a config with its value."""
    if not is_dataclass(value):
        yield name, value
        return
    for field in fields(value):
        yield from _leaves(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)


def _files(config: RunConfig, fingerprint: dict[str, Any]) -> dict[str, str]:
    """Return digests of tokenizer and corpora, by path. A corpus's side file has a checksum of all its tokens."""
    facts = {config.data.tokenizer: _digest(fingerprint["tokenizer"])}
    for part in ("train", "validation"):
        for (_, prefix), corpus in zip(getattr(config.data, part) or [], fingerprint[part]):
            paths = corpus_paths(prefix)
            for path, entry in ((paths.bin, corpus["bin"]), (paths.idx, corpus["idx"])):
                facts[str(path)] = f"{counted(entry['bytes'], 'byte')} with {_digest(entry['hash'])}"
            facts[str(paths.side)] = _digest(_sha256(paths.side)) if paths.side.is_file() else "no file"
    return facts


def _versions() -> dict[str, str]:
    versions = {"the version of Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[f"the version of {name}"] = version(name)
        except PackageNotFoundError:
            versions[f"the version of {name}"] = "none"
    if torch.cuda.is_available():
        versions["the version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {**versions, "the source of megatron_step": _digest(_source_hash())}


def _source_hash() -> str:
    """Return a hash of the names and contents of all Python files of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n{_sha256(path)}\n".encode())
    return digest.hexdigest()


def _probe() -> str:
    """Return a hash of a result computed from fixed numbers: kernels for other instructions round differently."""
    x = torch.linspace(-2.0, 3.0, 64 * 257).view(64, 257)
    normed = rms_norm(x, torch.linspace(0.5, 1.5, 257), 1e-5)
    return _digest(hashlib.sha256((normed @ x.T).numpy().tobytes()).hexdigest())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(digest: str) -> str:
    return f"sha256 {digest[:12]}"

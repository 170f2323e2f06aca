"""Compare every number of an export's tensors with its checkpoint.

A weight without an adapter must equal the checkpoint's, rounded to the export's number format. A merged weight may
differ from W + s B A in fp64 by the rounding of fp32 sums and of the export:

    |written - (W + s B A)| <= u |W + s B A| + (r + 2) v (|W| + |s| |B| |A|)

with the rank r, and with u and v half the relative spacing of numbers in the export's format and in fp32.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_step.config.yaml_json import read_json
from megatron_step.huggingface.hf_mapping import MappedWeight
from megatron_step.huggingface.peft_adapter import ADAPTER_CONFIG, ADAPTER_FILE, factor_names
from megatron_step.huggingface.safetensors_files import HFTensors
from megatron_step.huggingface.saved_weights import SavedWeights
from megatron_step.plan.names import factor_keys

_BLOCK_ELEMENTS = 1 << 22  # size of the blocks of a weight that are compared in fp64


def wrong_tensor(
    folder: Path,
    adapter: Path | None,
    weights: Sequence[MappedWeight],
    saved: SavedWeights,
    scaling: float,
    dtype: torch.dtype,
) -> str | None:
    """Describe the first tensor of the export in `folder` that differs from the checkpoint's; None if all agree.

    If `adapter`, the folder of a LoRA adapter, is given, base weights and factors are compared. Else the export must
    hold weights with adapters merged by `scaling`, alpha / rank.
    """
    written = HFTensors(folder)
    expected = {name for weight in weights for name in weight.names}
    if written.keys() != expected:
        return f"{', '.join(sorted(written.keys() ^ expected)[:4])}: missing from the export, or not in the model"
    merged = [] if adapter is not None else saved.adapted
    problems = (
        _merged(weight, written, saved, scaling, dtype)
        if weight.key in merged
        else _plain(weight, written, saved, dtype)
        for weight in weights
    )
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is None and adapter is not None:
        return _wrong_factor(adapter, weights, saved, scaling, dtype)
    return problem


def _plain(weight: MappedWeight, written: Mapping[str, Tensor], saved: SavedWeights, dtype: torch.dtype) -> str | None:
    whole = saved.read([weight.key])[weight.key].to(dtype)
    return _unequal(weight.split(whole), written, weight.key, dtype)


def _wrong_factor(
    adapter: Path, weights: Sequence[MappedWeight], saved: SavedWeights, scaling: float, dtype: torch.dtype
) -> str | None:
    """Describe the first factor A or B, or scale, that differs from the checkpoint's adapters; None if all agree."""
    settings = read_json(adapter / ADAPTER_CONFIG)
    if settings["lora_alpha"] != scaling * settings["r"]:
        return f"{ADAPTER_CONFIG} scales by {settings['lora_alpha']} / {settings['r']}, not by {scaling:g}"
    with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
        left = set(file.keys())
        for weight in weights:
            if weight.key not in saved.adapted:
                continue
            a_key, b_key = factor_keys(weight.key)
            factors = saved.read([a_key, b_key])
            for name, b in weight.split(factors[b_key].to(dtype)).items():
                pair = dict(zip(factor_names(name), (factors[a_key].to(dtype), b)))
                if not left >= pair.keys():
                    return f"{', '.join(pair)}: missing from the export"
                left -= pair.keys()
                problem = _unequal(pair, {one: file.get_tensor(one) for one in pair}, weight.key, dtype)
                if problem is not None:
                    return problem
    return f"{', '.join(sorted(left)[:4])}: in the export, but not in the checkpoint" if left else None


def _unequal(expected: Mapping[str, Tensor], written: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> str | None:
    for name, tensor in expected.items():
        found = written[name]
        if found.dtype != dtype or not torch.equal(found, tensor):
            return f"{name} is not {key} rounded to {str(dtype).removeprefix('torch.')}"
    return None


def _merged(
    weight: MappedWeight, written: Mapping[str, Tensor], saved: SavedWeights, scaling: float, dtype: torch.dtype
) -> str | None:
    found = {name: written[name] for name in weight.names}
    for columns, exact, bound in _exact_blocks(weight.key, saved, scaling, dtype):
        limits = weight.split(bound)
        for name, block in weight.split(exact).items():
            if found[name].dtype != dtype or not bool(((found[name][:, columns] - block).abs() <= limits[name]).all()):
                return f"{name} is not {weight.key} with its adapter merged"
    return None


def _exact_blocks(
    key: str, saved: SavedWeights, scaling: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of columns: a slice, W + s B A in fp64, and the allowed difference of each number."""
    read = saved.read([key, *factor_keys(key)])
    whole, a, b = (read[name] for name in (key, *factor_keys(key)))
    a, b = a.double(), b.double()
    half_step, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    sums = (a.shape[0] + 2) * torch.finfo(torch.float32).eps / 2
    width = max(1, _BLOCK_ELEMENTS // whole.shape[0])
    for first in range(0, whole.shape[1], width):
        columns = slice(first, first + width)
        block = whole[:, columns].double()
        exact = torch.addmm(block, b, a[:, columns], alpha=scaling)
        terms = torch.addmm(block.abs(), b.abs(), a[:, columns].abs(), alpha=abs(scaling))
        yield columns, exact, half_step * exact.abs() + (1 + half_step) * sums * terms + smallest

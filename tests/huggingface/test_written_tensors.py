"""Each number of an export is compared with the checkpoint's, merged or apart, whatever the depth and number format."""

from pathlib import Path

import pytest
import torch
from planted_faults import FAULTS, Exports, rotate_otherwise
from safetensors.torch import load_file, save_file

from megatron_step.engine.parallel import Parallel
from megatron_step.huggingface.comparison import wrong_setting
from megatron_step.huggingface.hf_mapping import hf_mapping
from megatron_step.huggingface.saved_weights import SavedWeights
from megatron_step.huggingface.written_tensors import wrong_tensor


@pytest.fixture(scope="module", params=[(4, "fp32"), (4, "bf16"), (30, "fp32"), (30, "bf16")], ids=str)
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"), *request.param)


def problem(exports: Exports, model: Path, adapter: Path | None, parallel: Parallel) -> str | None:
    config, found = exports.config, exports.found(parallel)
    vocab_size = found.manifest.vocab_size
    return wrong_setting(model, config.model, vocab_size) or wrong_tensor(
        model, adapter, hf_mapping(config.model, vocab_size), SavedWeights(found), 2.0, exports.dtype
    )


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_right_export_has_no_problem_and_each_fault_is_one(
    exports: Exports, tmp_path: Path, alone: Parallel, is_apart: bool
) -> None:
    assert problem(exports, *exports.copy(is_apart, tmp_path / "right"), alone) is None
    for fault in FAULTS:
        model, adapter = exports.copy(is_apart, tmp_path / fault.__name__)
        fault(exports, model, adapter)
        found = problem(exports, model, adapter, alone)
        assert found is not None, fault
        assert ("rope_theta" in found) == (fault is rotate_otherwise)


@pytest.mark.parametrize("is_apart", [False, True])
def test_one_number_is_enough(exports: Exports, tmp_path: Path, alone: Parallel, is_apart: bool) -> None:
    model, adapter = exports.copy(is_apart, tmp_path / "out")
    tensors = load_file(model / "model.safetensors")
    number = tensors["model.layers.1.mlp.up_proj.weight"][3, 5]
    number *= 1 + 4 * torch.finfo(exports.dtype).eps * (1 if exports.dtype is torch.bfloat16 else 20)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = problem(exports, model, adapter, alone)
    assert found is not None
    assert "layers.1.mlp.up_proj.weight is not decoder.layers.1.mlp.linear_fc1.weight" in found
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert problem(exports, model, adapter, alone) == "model.norm.weight: missing from the export, or not in the model"

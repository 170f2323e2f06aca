"""Two right implementations lie about as far from fp64; a part that is wrong carries one of them much farther."""

from pathlib import Path

import pytest
import torch
from planted_faults import FAULTS, Exports, rotate_otherwise

from megatron_step.engine.parallel import Parallel
from megatron_step.huggingface.comparison import (
    Comparison,
    compare_logits,
    exported_model,
    logits_of,
    trained_model,
    wrong_setting,
)
from megatron_step.huggingface.reference import reference_logits
from megatron_step.huggingface.saved_weights import SavedWeights

TOKENS = torch.arange(32)[None] * 7 % 250


@pytest.fixture(
    scope="module", params=[(4, "bf16", False), (4, "fp32", True), (30, "bf16", False), (30, "fp32", True)], ids=str
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exports, bool]:
    """Exports, and whether the one with adapters apart is meant."""
    num_layers, precision, is_apart = request.param
    return Exports(tmp_path_factory.mktemp("exports"), num_layers, precision), is_apart


def test_a_right_export_is_within_rounding_and_no_fault_is(
    made: tuple[Exports, bool], tmp_path: Path, alone: Parallel
) -> None:
    exports, is_apart = made
    found = exports.found(alone)
    trained = logits_of(trained_model(found, SavedWeights(found), is_apart, exports.dtype, alone), TOKENS, 250)

    def result(model: Path, adapter: Path | None) -> Comparison:
        exported = logits_of(exported_model(model, adapter, alone.device), TOKENS, 250)
        return compare_logits(trained, exported, reference_logits(model, adapter, TOKENS))

    right = result(*exports.copy(is_apart, tmp_path / "right"))
    assert right.is_within_rounding, right
    assert right.agreement == 1
    for fault in FAULTS:
        model, adapter = exports.copy(is_apart, tmp_path / fault.__name__)
        fault(exports, model, adapter)
        assert not result(model, adapter).is_within_rounding, fault


def test_a_setting_that_is_another_is_named(tmp_path: Path) -> None:
    exports = Exports(tmp_path, 2, "fp32")
    model = exports.config.model
    assert wrong_setting(tmp_path / "merged", model, 250) is None
    assert wrong_setting(tmp_path / "merged", model, 249) == "its config.json gives vocab_size 250, not 249"
    rotate_otherwise(exports, tmp_path / "merged", None)
    assert wrong_setting(tmp_path / "merged", model, 250) == "its config.json gives rope_theta 20000.0, not 10000.0"


def test_differences_are_counted_as_they_are() -> None:
    exact = 4.0 * torch.nn.functional.one_hot(torch.arange(10)[None] % 12, 12).double()  # [1, s, v]
    other = exact.clone()
    other[:, ::2, 11] += 5.0  # at every second position: another likeliest token
    result = compare_logits(exact.float(), other.float(), exact)
    assert (result.max_difference, result.largest_logit, result.agreement) == (5.0, 4.0, 0.5)
    assert result.mean_difference == pytest.approx(5.0 / 2 / 12)
    assert (result.trained_error, result.exported_error) == pytest.approx((0.0, 5.0 / 24**0.5))
    assert not result.is_within_rounding
    assert "differ by 5.00e+00 at most, 2.08e-01 on average" in str(result)


@pytest.mark.parametrize(
    ("trained", "exported", "is_right"),
    [(1e-6, 7e-6, True), (7e-6, 1e-6, True), (1e-6, 2e-5, False), (2e-5, 1e-6, False), (0.0, 3e-6, True)],
)
def test_the_larger_error_is_bounded_by_the_smaller(trained: float, exported: float, is_right: bool) -> None:
    assert Comparison(1.0, 1.0, 1.0, 1.0, trained, exported).is_within_rounding == is_right

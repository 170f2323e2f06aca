"""The rule of each weight, and the rows of its logical matrices."""

import pytest
from small_run import small_config

from megatron_step.plan.matrices import Matrix, logical_matrices, rule_of
from megatron_step.plan.names import EMBEDDING, FC1, FINAL_NORM, OUTPUT_LAYER, PROJ, QKV, factor_keys, layer_key

MODEL = small_config(model={"num_query_groups": 2}).model  # four heads of width 16 in two groups


def _key(name: str) -> str:
    return layer_key(3, name)


def test_muon_trains_the_matrices_of_layers() -> None:
    for name in (QKV, PROJ, FC1):
        assert rule_of(_key(f"{name}.weight"), (8, 8), "muon") == "muon"
        assert rule_of(_key(f"{name}.weight"), (8, 8), "adamw") == "adamw"
    for key, shape in (
        (EMBEDDING, (9, 8)),
        (OUTPUT_LAYER, (9, 8)),
        (FINAL_NORM, (8,)),
        (_key(f"{QKV}.layer_norm_weight"), (8,)),
        (_key(f"{QKV}.bias"), (8,)),
        *((key, (4, 8)) for key in factor_keys(_key(f"{QKV}.weight"))),
    ):
        assert rule_of(key, shape, "muon") == "adamw"


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 4)])
def test_a_weight_that_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"optimizer.rule muon trains matrices, but decoder.layers.3.mlp.linear_fc1.w"):
        rule_of(_key(f"{FC1}.weight"), shape, "muon")


def test_fused_weights_have_their_parts_apart() -> None:
    key = _key(f"{QKV}.weight")
    query, key_rows, value = logical_matrices(key, 128, 64, MODEL)
    assert (query.rows, key_rows.rows, value.rows) == (64, 32, 32)
    assert list(query.runs(0, 128)) == [(0, 32, 0), (64, 96, 32)]
    assert list(key_rows.runs(0, 128)) == [(32, 48, 0), (96, 112, 16)]
    assert list(value.runs(0, 128)) == [(48, 64, 0), (112, 128, 16)]
    gate, up = logical_matrices(_key(f"{FC1}.weight"), 192, 64, MODEL)
    assert (list(gate.runs(0, 192)), list(up.runs(0, 192))) == ([(0, 96, 0)], [(96, 192, 0)])
    plain = small_config(model={"mlp": "gelu"}).model
    assert logical_matrices(_key(f"{FC1}.weight"), 96, 64, plain) == [Matrix(_key(f"{FC1}.weight"), 96, 0, 96, 96, 64)]


def test_runs_of_a_part_of_the_rows() -> None:
    matrix = Matrix("a", period=10, first=4, last=7, rows=9, columns=2)
    assert list(matrix.runs(5, 26)) == [(5, 7, 1), (14, 17, 3), (24, 26, 6)]
    assert list(matrix.runs(7, 14)) == []
    assert matrix.numel == 18


def test_all_rows_belong_to_one_matrix() -> None:
    for name, rows in ((QKV, 128), (FC1, 192), (PROJ, 64)):
        matrices = logical_matrices(_key(f"{name}.weight"), rows, 64, MODEL)
        seen = sorted(
            row for matrix in matrices for first, last, _ in matrix.runs(3, rows) for row in range(first, last)
        )
        assert seen == list(range(3, rows))

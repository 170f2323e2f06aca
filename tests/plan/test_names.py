"""Names of weights are those that the model's modules and checkpoints have."""

import pytest
from small_run import TIED, VOCAB_SIZE, small_config

from megatron_step.plan import names
from megatron_step.plan.names import factor_keys, in_layer, layer_key, layer_of
from megatron_step.plan.resolved import resolve
from megatron_step.planner.costs.held import held_chunks
from megatron_step.planner.plan import make_plan


def _keys(model: dict | None = None) -> list[str]:
    config = small_config(model=model, stages={"count": 2, "layers": [3, 1]})
    stage = make_plan(resolve(config, VOCAB_SIZE)).stages[1]
    return [parameter.key for parameter in held_chunks(resolve(config, VOCAB_SIZE), stage)[0][0].parameters]


def test_every_weight_is_of_one_kind() -> None:
    outside = {key for key in _keys() if layer_of(key) < 0}
    assert outside == {names.EMBEDDING, names.OUTPUT_LAYER, names.FINAL_NORM}
    assert names.is_embedding(names.EMBEDDING)
    assert names.is_output_layer(names.OUTPUT_LAYER)
    assert names.is_norm(names.FINAL_NORM)
    tests = [names.is_norm, names.is_bias, names.is_adapter_a, names.is_adapter_b]
    linears = {f"{linear}.weight" for linear in (names.QKV, names.PROJ, names.FC1, names.FC2)}
    for key in _keys(TIED):
        if layer_of(key) >= 0:
            is_matrix = key.partition(f"{layer_of(key)}.")[2] in linears
            assert sum(test(key) for test in tests) == (not is_matrix), key
            assert names.is_adapter(key) == (names.is_adapter_a(key) or names.is_adapter_b(key))


def test_two_matrices_of_a_layer_write_into_the_residual_stream() -> None:
    writers = [key for key in _keys() if layer_of(key) == 1 and names.writes_residual(key)]
    assert writers == [layer_key(1, f"{names.PROJ}.weight"), layer_key(1, f"{names.FC2}.weight")]


@pytest.mark.parametrize("layer", [0, 7, 123])
def test_a_key_tells_its_layer(layer: int) -> None:
    key = layer_key(layer, f"{names.QKV}.weight")
    assert (layer_of(key), in_layer(key, 5)) == (layer, layer_key(5, f"{names.QKV}.weight"))


def test_an_adapter_lies_below_its_linear() -> None:
    matrices = [key for key in _keys() if key.endswith(f"{names.FC1}.weight")]
    keys = _keys()
    assert any(set(factor_keys(key)) <= set(keys) for key in matrices)
